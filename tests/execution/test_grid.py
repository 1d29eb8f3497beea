"""The grid equals the naive reference in values and gradients, for ragged documents and all variants."""

import itertools

import pytest
import torch

from recurrent_bart.data.batches import Batch
from recurrent_bart.execution import grid
from recurrent_bart.training.windows import count_windows, window_losses
from reference import context, encode
from tiny import NORM_ORDERS, batch_of, random_ids

FIELDS = ("recurrence", "prefix_attention", "prefix_projection", "update_gate")
VARIANTS = [
    dict(zip(FIELDS, values, strict=True))
    for values in itertools.product(("layerwise", "top"), ("gated", "concat"), (True, False), (True, False))
] + [
    {"recurrence": "none", "prefix_attention": attention, "prefix_projection": projection}
    for attention, projection in itertools.product(("gated", "concat"), (True, False))
]
VARIANTS += [{"associative_memory": True, "prefix_attention": attention} for attention in ("gated", "concat")]
VARIANTS += [variant | {"schedule": "wavefront"} for variant in VARIANTS if variant.get("recurrence") != "top"]
VARIANTS += [variant | {"normalize_before": True} for variant in VARIANTS]
# lengths of the segments of each document
DOCUMENTS = {
    "one": [[8]],
    "odd": [[8, 7, 1]],
    "long": [[63, 63, 1]],
    "many": [[8] * 6 + [7]],
    "ragged": [[8, 8, 3], [5], [8, 2]],
    "sparse": [[1, 1, 1], [8, 1], [2, 7, 1, 4]],
}


def name_of(variant):
    return "-".join(map(str, variant.values()))


def model_for(make_model, lengths, **fields):
    longest = max(length for segments in lengths for length in segments)
    return make_model(**fields | ({"segment_size": longest} if longest > 8 else {}))


@pytest.mark.pairwise
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_values_are_the_references(make_model, variant, lengths):
    model = model_for(make_model, lengths, **variant)
    documents, input_ids, mask = batch_of(lengths)
    output = model.model.encoder(input_ids, attention_mask=mask)
    for row, document in enumerate(documents):
        after, states = encode(model, document)
        seen = output.context_mask[row].bool()
        torch.testing.assert_close(
            output.last_hidden_state[row, seen], context(model.config, after, len(after) - 1), rtol=0, atol=1e-10
        )
        assert output.state.position[row] == len(document)
        if states:
            torch.testing.assert_close(output.state.memory[row], torch.stack(states), rtol=0, atol=1e-10)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.model.encoder.named_parameters()}


@pytest.mark.pairwise
@pytest.mark.parametrize("lengths", [DOCUMENTS["odd"], DOCUMENTS["ragged"]], ids=["odd", "ragged"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_gradients_are_the_references(make_model, variant, lengths):
    model = model_for(make_model, lengths, **variant)
    documents, input_ids, mask = batch_of(lengths)
    output = model.model.encoder(input_ids, attention_mask=mask)
    weight = torch.randn(model.config.d_model, dtype=torch.float64)
    got = gradients_of(model, (output.last_hidden_state[output.context_mask.bool()].sin() @ weight).sum())
    contexts = [context(model.config, encode(model, document)[0], len(document) - 1) for document in documents]
    expected = gradients_of(model, sum((rows.sin() @ weight).sum() for rows in contexts))
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.pairwise
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_context_after_every_segment_is_the_references(make_model, variant):
    model = make_model(**variant)
    documents, input_ids, mask = batch_of(DOCUMENTS["ragged"])
    output = model.model.encoder(input_ids, attention_mask=mask, decode_at="every_segment")
    for row, document in enumerate(documents):
        after, _ = encode(model, document)
        for t in range(len(document)):
            seen = output.context_mask[row, t].bool()
            torch.testing.assert_close(
                output.last_hidden_state[row, t, seen], context(model.config, after, t), rtol=0, atol=1e-10
            )
    assert output.is_read.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_without_recurrence_segments_are_read_alone(make_model, schedule, norms):
    model = make_model(pre_seq_len=0, schedule=schedule, **norms)
    documents, input_ids, mask = batch_of(DOCUMENTS["ragged"])
    output = model.model.encoder(input_ids, attention_mask=mask)
    for row, document in enumerate(documents):
        after, _ = encode(model, document)
        seen = output.context_mask[row].bool()
        torch.testing.assert_close(output.last_hidden_state[row, seen], after[-1][1], rtol=0, atol=1e-10)
    assert output.state.memory is None


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_top_without_projection_is_barts_attention_over_memory_and_tokens(make_model, norms):
    """RMT as published: BART reads `memory, tokens`, and the outputs at the memory positions are the next state."""
    fields = {"recurrence": "top", "prefix_attention": "concat", "prefix_projection": False, "update_gate": False}
    model = make_model(**fields, **norms)
    encoder, ids = model.model.encoder, random_ids(1, 2, 8)
    stream = torch.empty(0)
    memory = encoder.recurrence.initial_memory
    for segment in ids[0]:
        tokens = encoder.embed_tokens(segment[None]) + encoder.embed_positions(segment[None])
        stream = encoder.layernorm_embedding(torch.cat([memory, tokens], dim=1))
        for layer in encoder.layers:
            stream = layer(stream, attention_mask=None)
        stream = stream if encoder.layer_norm is None else encoder.layer_norm(stream)
        memory = stream[:, :3]
    torch.testing.assert_close(encoder(ids).last_hidden_state, stream, rtol=0, atol=1e-12)


WITHOUT_A_STATE = [{"pre_seq_len": 0}, {"recurrence": "none"}, {"recurrence": "none", "normalize_before": True}]


@pytest.mark.each_value
@pytest.mark.parametrize("fields", WITHOUT_A_STATE, ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
@pytest.mark.parametrize(("most_tokens", "n_calls"), [(10_000, 1), (48, 3), (1, 5)])
def test_segments_without_a_state_run_as_batches(make_model, monkeypatch, fields, checkpointing, most_tokens, n_calls):
    """Three documents of 5 segments of 8 tokens: two segments have 48 tokens.

    Without checkpointing, the limit of tokens does not apply: all activations stay for the backward pass anyway.
    """
    n_calls = n_calls if checkpointing != "none" else 1
    _, input_ids, mask = batch_of([[8, 8, 3, 8, 7], [8, 5], [8, 8, 8]])
    monkeypatch.setattr(grid, "MOST_TOKENS", most_tokens)
    found = []
    for schedule in ("sequential", "wavefront"):
        torch.manual_seed(0)
        model = make_model(decoder_context="all", schedule=schedule, attn_implementation="eager", **fields).train()
        model.set_gradient_checkpointing(checkpointing)
        calls = []
        model.model.encoder.layers[0].register_forward_pre_hook(lambda *inputs: calls.append(inputs))  # noqa: B023
        wanted = {"output_hidden_states": True, "output_attentions": True}
        torch.manual_seed(1)
        output = model.model.encoder(input_ids, attention_mask=mask, **wanted)
        assert len(calls) == (n_calls if schedule == "wavefront" else 5)
        output.last_hidden_state.sin().sum().backward()
        gradients = [parameter.grad for parameter in model.model.encoder.parameters()]
        found.append([output.last_hidden_state, *output.hidden_states, *output.attentions, *gradients])
    for expected, parallel in zip(*found, strict=True):
        torch.testing.assert_close(parallel, expected, rtol=0, atol=1e-10)


TARGETS = {
    "document": {"decoder_context": "all"},
    "last segments": {"decoder_context": "all", "context_segments": 2},
    "sections": {"decoder_context": "section", "bptt_depth": -1},
    "windows": {"decoder_context": "section", "bptt_depth": 1},
}


@pytest.mark.each_value
@pytest.mark.parametrize("fields", WITHOUT_A_STATE, ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("most_tokens", [10_000, 48])
def test_padding_segments_without_a_state_are_left_out(
    make_model, monkeypatch, fields, checkpointing, targets, most_tokens
):
    """Losses and gradients equal the sequential schedule's, which computes padding segments too."""
    monkeypatch.setattr(grid, "MOST_TOKENS", most_tokens)
    _, input_ids, mask = batch_of([[8, 8, 3, 8, 7], [8, 5], [8, 8, 8]])
    labels = random_ids(3, 5, 4).masked_fill(~mask.bool()[:, :, :1], -100)
    labels[0, 2] = -100
    labels = labels if targets in ("sections", "windows") else labels[:, 0]
    batch, found, n_rows = Batch(input_ids, mask, labels, [0, 1, 2]), [], []
    for schedule in ("sequential", "wavefront"):
        torch.manual_seed(0)
        model = make_model(schedule=schedule, **fields, **TARGETS[targets]).train()
        model.set_gradient_checkpointing(checkpointing)
        rows = []
        model.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))  # noqa: B023
        losses, n_windows = [], count_windows(batch, model.config)
        for loss in window_losses(model, model.config, batch, torch.device("cpu"), n_windows, 10.0):
            # without the calls that checkpointing repeats
            n_rows.append((schedule, sum(rows)))
            loss.backward()
            losses.append(loss.detach())
            rows.clear()
        found.append([*losses, *(parameter.grad for parameter in model.parameters())])
    for expected, parallel in zip(*found, strict=True):
        torch.testing.assert_close(parallel, expected, rtol=0, atol=1e-10)
    sequential, parallel = (sum(n for name, n in n_rows if name == kind) for kind in ("sequential", "wavefront"))
    assert parallel < sequential
    assert all(n % 3 == 0 for _, n in n_rows)


@pytest.mark.parametrize("fields", WITHOUT_A_STATE, ids=str)
def test_the_layers_see_each_segment_with_text_once(make_model, fields):
    """Ten segments have text, and the number of rows is the next multiple of three documents."""
    _, input_ids, mask = batch_of([[8, 8, 3, 8, 7], [8, 5], [8, 8, 8]])
    model, seen = make_model(schedule="wavefront", decoder_context="all", **fields), []
    model.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole = model.model.encoder(input_ids, attention_mask=mask)
    assert [tuple(stream.shape[:2]) for stream in seen] == [(12, 8)]
    with torch.no_grad():
        read = model.model.encoder(input_ids, attention_mask=mask)
        alone = [model.model.encoder(input_ids[row : row + 1], attention_mask=mask[row : row + 1]) for row in range(3)]
    for row in range(3):
        expected = alone[row].last_hidden_state[0, alone[row].context_mask[0].bool()]
        for output in (whole, read):
            found = output.last_hidden_state[row, output.context_mask[row].bool()]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", WITHOUT_A_STATE, ids=str)
def test_documents_without_text_are_read_without_a_state(make_model, fields):
    """A batch in which no document has text in this call still runs, as the sequential schedule does."""
    contexts = []
    for schedule in ("sequential", "wavefront"):
        torch.manual_seed(0)
        model = make_model(schedule=schedule, decoder_context="all", **fields)
        state = model.model.encoder(random_ids(2, 2, 8)).state
        nothing = torch.ones(2, 3, 8, dtype=torch.long), torch.zeros(2, 3, 8, dtype=torch.long)
        output = model.model.encoder(nothing[0], attention_mask=nothing[1], state=state)
        contexts.append(output.last_hidden_state[output.context_mask.bool()])
        assert output.state.position.tolist() == [2, 2]
    torch.testing.assert_close(*contexts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context_segments", [2, -1])
def test_segments_without_a_state_keep_a_graph_only_if_the_decoder_sees_them(make_model, context_segments):
    """A part of the segments runs without a graph, and a part with one."""
    fields = {"decoder_context": "all", "context_segments": context_segments, "recurrence": "none"}
    results = []
    for schedule in ("sequential", "wavefront"):
        torch.manual_seed(0)
        model = make_model(schedule=schedule, **fields)
        embeds = model.model.encoder.embed_tokens(random_ids(2, 5, 8).fill_(7)).detach().requires_grad_()
        output = model.model.encoder(inputs_embeds=embeds)
        output.last_hidden_state.sin().sum().backward()
        results.append((output.last_hidden_state.detach(), embeds.grad))
    for expected, parallel in zip(*results, strict=True):
        torch.testing.assert_close(parallel, expected, rtol=0, atol=1e-12)
    assert (results[1][1].abs().amax(dim=(0, 2, 3)) > 0).sum() == (5 if context_segments == -1 else 2)


@pytest.mark.parametrize("frozen", ["nothing", "encoder", "everything"])
def test_the_limit_of_tokens_applies_where_no_activations_are_kept(make_model, monkeypatch, frozen):
    """Embeddings that require a gradient keep the activations of a frozen encoder."""
    monkeypatch.setattr(grid, "MOST_TOKENS", 48)
    _, input_ids, mask = batch_of([[8, 8, 3, 8], [8, 5], [8, 8, 8]])
    model, n_rows = make_model(schedule="wavefront", decoder_context="all", pre_seq_len=0), []
    if frozen != "nothing":
        model.requires_grad_(False)
    embeds = model.model.shared(input_ids).detach().requires_grad_(frozen == "encoder")
    model.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: n_rows.append(len(inputs[0])))
    model.model.encoder(inputs_embeds=embeds, attention_mask=mask)
    assert sorted(n_rows) == ([3, 6] if frozen == "everything" else [9])
