"""The grid against the naive reference: values and gradients, ragged documents, all variants."""

import pytest
import torch

from recurrent_bart.segmentation import pad_segments
from reference import encode
from tiny import random_ids

VARIANTS = [
    {"prefix_attention": attention, "prefix_projection": projection, "update_gate": gate}
    for attention in ("gated", "concat")
    for projection in (True, False)
    for gate in (True, False)
]
# lengths of the segments of each document
DOCUMENTS = {
    "one": [[8]],
    "odd": [[8, 8, 1]],
    "many": [[8] * 6 + [7]],
    "ragged": [[8, 8, 3], [5], [8, 2]],
    "sparse": [[1, 1, 1], [8, 1], [2, 8, 1, 4]],
}


def batch_of(lengths):
    """Ids of documents, as lists and as one padded batch."""
    documents = [[random_ids(n).tolist() for n in segments] for segments in lengths]
    input_ids = torch.tensor(pad_segments(documents, padding=-1))
    return documents, input_ids.clamp(min=1), (input_ids >= 0).long()


def reference_context(model, document):
    """What the decoder sees after the last segment, and the state."""
    after, states = encode(model, document)
    memory, tokens = after[-1]
    return torch.cat([memory, tokens]), torch.stack(states)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_are_the_references(make_model, variant, lengths):
    model = make_model(**variant)
    documents, input_ids, mask = batch_of(lengths)
    output = model.model.encoder(input_ids, attention_mask=mask)
    for row, document in enumerate(documents):
        context, memory = reference_context(model, document)
        seen = output.context_mask[row].bool()
        torch.testing.assert_close(output.last_hidden_state[row, seen], context, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.state.memory[row], memory, rtol=0, atol=1e-10)
        assert output.state.position[row] == len(document)


@pytest.mark.parametrize("lengths", [DOCUMENTS["odd"], DOCUMENTS["ragged"]], ids=["odd", "ragged"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_the_references(make_model, variant, lengths):
    model = make_model(**variant)
    documents, input_ids, mask = batch_of(lengths)
    output = model.model.encoder(input_ids, attention_mask=mask)
    weight = torch.randn(model.config.d_model, dtype=torch.float64)
    seen = output.context_mask.bool()
    (output.last_hidden_state[seen].sin() @ weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.model.encoder.named_parameters()}
    model.zero_grad()
    sum((reference_context(model, document)[0].sin() @ weight).sum() for document in documents).backward()
    for name, parameter in model.model.encoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_context_after_every_segment_is_the_references(make_model, variant):
    model = make_model(**variant)
    documents, input_ids, mask = batch_of(DOCUMENTS["ragged"])
    output = model.model.encoder(input_ids, attention_mask=mask, every_segment=True)
    for row, document in enumerate(documents):
        after, _ = encode(model, document)
        for t, (memory, tokens) in enumerate(after):
            seen = output.context_mask[row, t].bool()
            torch.testing.assert_close(
                output.last_hidden_state[row, t, seen], torch.cat([memory, tokens]), rtol=0, atol=1e-10
            )


def test_without_recurrence_segments_are_read_alone(make_model):
    model = make_model(pre_seq_len=0)
    documents, input_ids, mask = batch_of(DOCUMENTS["ragged"])
    output = model.model.encoder(input_ids, attention_mask=mask)
    for row, document in enumerate(documents):
        after, _ = encode(model, document)
        seen = output.context_mask[row].bool()
        torch.testing.assert_close(output.last_hidden_state[row, seen], after[-1][1], rtol=0, atol=1e-10)
    assert output.state is None


@pytest.mark.parametrize("every_segment", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
def test_bptt_gradient_reaches_as_far_as_the_window(make_model, depth, every_segment):
    """Windows of depth + 1 segments end at the last one; what stands before the window gets no gradient at all."""
    n_segments = 7
    model = make_model(bptt_depth=depth)
    ids = random_ids(2, n_segments, 8)
    embeds = model.model.encoder.embed_tokens(ids).detach().requires_grad_()
    output = model.model.encoder(inputs_embeds=embeds, every_segment=every_segment)
    for t in range(n_segments) if every_segment else [n_segments - 1]:
        context = output.last_hidden_state[:, t] if every_segment else output.last_hidden_state
        (gradient,) = torch.autograd.grad(context.sin().sum(), embeds, retain_graph=True)
        reached = gradient.abs().amax(dim=(0, 2, 3)) > 0
        window = n_segments if depth == -1 else depth + 1
        windows_from_end = [(n_segments - 1 - s) // window for s in range(n_segments)]
        expected = [s <= t and windows_from_end[s] == windows_from_end[t] for s in range(n_segments)]
        assert reached.tolist() == expected


def test_bptt_changes_no_value(make_model):
    ids = random_ids(2, 5, 8)
    values = []
    for depth in (-1, 0, 1):
        torch.manual_seed(0)
        values.append(make_model(bptt_depth=depth).model.encoder(ids).last_hidden_state)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


def test_every_parameter_has_a_gradient_when_the_state_is_cut(make_model):
    """ZeRO-3 gives a parameter without a gradient the one of the step before."""
    model = make_model(bptt_depth=1)
    model(input_ids=random_ids(1, 6, 8), labels=random_ids(1, 4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.model.encoder.recurrence.initial_memory.grad.count_nonzero() == 0


def test_gradient_checkpointing_changes_nothing(make_model):
    """HF's own layer checkpointing drops the prefix; here it must be alive, with the same dropout drawn again."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(dropout=0.2, attention_dropout=0.2, hidden_dropout_prob=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        loss = model(input_ids=random_ids(2, 4, 8), labels=random_ids(2, 5)).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (checkpointed_loss, checkpointed) = results
    assert loss == checkpointed_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, checkpointed[name]), name
    assert checkpointed["model.encoder.recurrence.projection_out"].abs().max() > 1e-6
