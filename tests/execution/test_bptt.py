"""Truncated BPTT: the exact reach of the gradient; truncation changes no value, and every parameter gets a gradient."""

import functools

import pytest
import torch

from recurrent_bart.monitoring.memory import peak_bytes
from recurrent_bart.recurrence import segmentation
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from tiny import random_ids

VARIANTS = {"layerwise": {}, "top": {"recurrence": "top"}, "wavefront": {"schedule": "wavefront"}}


@pytest.mark.pairwise
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_gradient_to_the_state_k_segments_back_is_zero_beyond_the_window_alone(make_model, fields, depth, k):
    """The gradient from segment t to the state at t - k crosses k boundaries."""
    model = make_model(bptt_depth=depth, **fields)
    first = model.model.encoder(random_ids(2, 3, 8)).state
    memory = first.memory.detach().requires_grad_()
    loss = model(
        input_ids=random_ids(2, k, 8), labels=random_ids(2, 4), state=RecurrentState(first.position, memory)
    ).loss
    (gradient,) = torch.autograd.grad(loss, memory, allow_unused=True)
    reaches = gradient is not None and bool((gradient.abs().amax(dim=(2, 3)) > 0).all())
    is_zero = gradient is None or gradient.count_nonzero() == 0
    assert (reaches, is_zero) == ((True, False) if depth == -1 or k <= depth else (False, True))


@pytest.mark.each_value
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("decode_at", ["last_segment", "every_segment"])
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
def test_gradient_reaches_as_far_as_the_window(make_model, depth, decode_at, fields):
    """Windows of depth + 1 segments end at the last segment; segments before the window get no gradient."""
    n_segments = 7
    model = make_model(bptt_depth=depth, **fields)
    ids = random_ids(2, n_segments, 8)
    embeds = model.model.encoder.embed_tokens(ids).detach().requires_grad_()
    output = model.model.encoder(inputs_embeds=embeds, decode_at=decode_at)
    is_every = decode_at == "every_segment"
    for t in range(n_segments) if is_every else [n_segments - 1]:
        context = output.last_hidden_state[:, t] if is_every else output.last_hidden_state
        (gradient,) = torch.autograd.grad(context.sin().sum(), embeds, retain_graph=True)
        reached = gradient.abs().amax(dim=(0, 2, 3)) > 0
        window = n_segments if depth == -1 else depth + 1
        windows_from_end = [(n_segments - 1 - s) // window for s in range(n_segments)]
        expected = [s <= t and windows_from_end[s] == windows_from_end[t] for s in range(n_segments)]
        assert reached.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("fields", [*VARIANTS.values(), {"recurrence": "none"}, {"pre_seq_len": 0}], ids=str)
@pytest.mark.parametrize("depth", [0, 2, -1])
@pytest.mark.parametrize("context_segments", [-1, 2])
def test_the_decoders_gradient_reaches_every_segment_in_its_context(make_model, fields, depth, context_segments):
    """`bptt_depth` cuts the gradient of the state only."""
    model = make_model(bptt_depth=depth, decoder_context="all", context_segments=context_segments, **fields)
    embeds = model.model.encoder.embed_tokens(random_ids(2, 5, 8)).detach().requires_grad_()
    model(inputs_embeds=embeds, labels=random_ids(2, 4)).loss.backward()
    reached = embeds.grad.abs().amax(dim=(0, 2, 3)) > 0
    has_state = fields.get("recurrence") != "none" and fields.get("pre_seq_len") != 0
    n_reached = {-1: 5, 2: 2}[context_segments]
    if has_state:
        n_reached = max(n_reached, {-1: 5, 0: 1, 2: 3}[depth])
    assert reached.tolist() == [False] * (5 - n_reached) + [True] * n_reached


@pytest.mark.parametrize("context", ["last", "memory", "all"])
def test_bptt_changes_no_value(make_model, context):
    ids = random_ids(2, 5, 8)
    values = []
    for depth in (-1, 0, 1):
        torch.manual_seed(0)
        values.append(make_model(bptt_depth=depth, decoder_context=context).model.encoder(ids).last_hidden_state)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize("fields", [*VARIANTS.values(), {"recurrence": "none"}], ids=str)
def test_every_parameter_has_a_gradient_when_the_state_is_cut(make_model, fields):
    """ZeRO-3 reuses the gradient of the step before for a parameter without a gradient."""
    model = make_model(bptt_depth=1, **fields)
    model(input_ids=random_ids(1, 6, 8), labels=random_ids(1, 4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if "recurrence" not in fields:
        assert model.model.encoder.recurrence.initial_memory.grad.count_nonzero() == 0


def test_documents_that_have_not_begun_keep_the_learned_state_alive(make_model):
    """The short document begins inside the last window, so the gradient reaches its initial state."""
    model = make_model(bptt_depth=1)
    ids, mask = random_ids(2, 5, 8), torch.ones(2, 5, 8, dtype=torch.long)
    mask[1, 2:] = 0
    model(input_ids=ids, attention_mask=mask, labels=random_ids(2, 4)).loss.backward()
    together = model.model.encoder.recurrence.initial_memory.grad.clone()
    assert together.abs().max() > 1e-9


def test_no_segment_before_the_window_keeps_a_graph(make_model):
    """The bytes saved for the backward pass do not grow with the document."""

    def saved_bytes(n_segments):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        model = make_model(bptt_depth=1)
        ids, labels = random_ids(1, n_segments, 8), random_ids(1, 4)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(input_ids=ids, labels=labels)
        return total

    assert saved_bytes(2) == saved_bytes(3) == saved_bytes(12)


def train_on(model, n_segments):
    """Run a forward and a backward pass with one target per document."""
    model(input_ids=random_ids(1, n_segments, 8), labels=random_ids(1, 4)).loss.backward()
    model.zero_grad()


@torch.no_grad()
def read(model, n_segments):
    model.model.encode(random_ids(1, n_segments, 8))


@pytest.fixture
def shard(monkeypatch):
    """Mark embedding tables as sharded."""
    return lambda: monkeypatch.setattr(segmentation, "is_sharded", lambda module: True)


@pytest.mark.slow
@pytest.mark.parametrize("work", [train_on, read])
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_longer_document_takes_no_more_memory_than_its_ids_and_mask(make_model, shard, is_sharded, schedule, work):
    """A sharded table needs no more either, once the document has more tokens than the vocabulary.

    The embeddings of one segment would take 1,024 bytes.
    """
    model = make_model(bptt_depth=2, schedule=schedule)
    if is_sharded:
        shard()
    peaks = [peak_bytes(functools.partial(work, model, n), torch.device("cpu")) for n in (16, 112)]
    # the id and the mask of a token take 8 bytes each
    assert (peaks[1] - peaks[0]) / 96 <= 8 * 2 * 8 + 2


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@pytest.mark.parametrize("scale", [False, True])
def test_rows_of_a_sharded_table_are_the_embeddings_bit_for_bit(make_model, monkeypatch, shard, schedule, scale):
    """48 tokens lie before the window: fewer than a vocabulary of 60, more than one of 40."""
    model = make_model(bptt_depth=1, schedule=schedule, scale_embedding=scale, vocab_size=60)
    inputs = {"input_ids": random_ids(2, 5, 8) % 40, "labels": random_ids(2, 4) % 40}

    def results():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = results()
    shard()
    for vocab_size in (60, 40):
        monkeypatch.setattr(model.model.encoder.config, "vocab_size", vocab_size)
        for pair in zip(expected, results(), strict=True):
            assert torch.equal(*pair)


@pytest.mark.each_value
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("depth", [0, 2, -1])
def test_modules_are_called_as_often_however_many_segments_there_are(make_model, shard, depth, task):
    """Under ZeRO-3, each module call outside the encoder is a collective, and ranks have different documents."""
    shard()

    def calls(n_segments):
        model, names = make_model(bptt_depth=depth).train(), []
        for name, module in model.named_modules():
            if not name.startswith("model.encoder."):
                module.register_forward_pre_hook(lambda module, inputs, name=name: names.append(name))
        labels = random_ids(2, 4) if task == "document" else random_ids(2, n_segments, 4)
        model(input_ids=random_ids(2, n_segments, 8), labels=labels)
        return names

    assert calls(1) == calls(3) == calls(7)
