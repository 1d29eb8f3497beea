"""Calls with a state that read nothing more, for all documents or for some: the decoder sees what it saw before."""

import pytest
import torch

from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from tiny import batch_of, random_ids

FIELDS = {
    f"{name} {most}": {"decoder_context": name, "context_segments": most}
    for name in ("last", "memory", "section", "all")
    for most in (-1, 1, 2)
}
FIELDS |= {f"{name} of top": {"decoder_context": name, "recurrence": "top"} for name in ("last", "memory")}
FIELDS |= {f"{name} of none": {"decoder_context": name, "recurrence": "none"} for name in ("last", "all")}
FIELDS |= {"no recurrence": {"pre_seq_len": 0}, "gated": {"decoder_context": "memory", "prefix_attention": "gated"}}
of_every_context = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
SCHEDULES = ["sequential", "wavefront"]
LENGTHS = [[8, 8, 3], [5], [8, 2]]
# shapes of ids whose mask is all 0
EMPTY = [(3, 2, 8), (3, 1, 1), (3, 20), (3, 4), (3, 0), (3, 0, 8), (3, 2, 0)]


def build(make_model, fields, schedule="sequential", **changes):
    is_sequential = schedule == "sequential" or fields.get("recurrence") == "top"
    return make_model(schedule="sequential" if is_sequential else schedule, **fields, **changes)


def seen_by(context, mask):
    """Return the visible positions of each document."""
    return [rows[is_seen.bool()] for rows, is_seen in zip(context, mask, strict=True)]


def check_same_state(found, expected):
    assert torch.equal(found.position, expected.position)
    assert found.keys() == expected.keys()
    for name, mask in (("context", "context_number"), ("tokens", "tokens_mask")):
        if name in expected:
            pairs = seen_by(found[name], found[mask]), seen_by(expected[name], expected[mask])
            assert all(torch.equal(*rows) for rows in zip(*pairs, strict=True))
    if expected.memory is not None:
        assert torch.equal(found.memory, expected.memory)


@pytest.mark.each_value
@of_every_context
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_call_that_reads_nothing_changes_neither_state_nor_context(make_model, fields, schedule):
    """Check also that more text then gives the same numbers."""
    model, labels = build(make_model, fields, schedule), random_ids(3, 4)
    _, ids, mask = batch_of(LENGTHS)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    first = state = model.model.encode(ids, mask).state.detach()
    for shape in EMPTY:
        nothing = {"input_ids": torch.ones(shape).long(), "attention_mask": torch.zeros(shape).long()}
        output = model(**nothing, labels=labels, state=state)
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-12)
        check_same_state(output.state, first)
        state = output.state.detach()
    more = random_ids(3, 2, 8)
    expected = model(input_ids=more, labels=labels, state=first)
    found = model(input_ids=more, labels=labels, state=state)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    check_same_state(found.state, expected.state)


@pytest.mark.each_value
@of_every_context
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_ended_document_is_decoded_as_before_while_others_go_on(make_model, fields, schedule):
    """Compare with each document alone at once, over two calls; documents end in the first, second and third call."""
    model, labels = build(make_model, fields, schedule), random_ids(3, 4)
    documents = [random_ids(1, n_segments, 8) for n_segments in (2, 3, 6)]
    alone = [model(input_ids=ids, labels=labels[row : row + 1]).logits[0] for row, ids in enumerate(documents)]
    state = None
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        ids, mask = torch.ones(3, 2, 8, dtype=torch.long), torch.zeros(3, 2, 8, dtype=torch.long)
        for row, document in enumerate(documents):
            part = document[0, start:stop]
            ids[row, : len(part)], mask[row, : len(part)] = part, 1
        output = model(input_ids=ids, attention_mask=mask, labels=labels, state=state)
        for row, document in enumerate(documents):
            if document.shape[1] <= stop:
                torch.testing.assert_close(output.logits[row], alone[row], rtol=0, atol=1e-12)
        state = output.state
        # a model without a carried state returns one only if one was given
        state = state or model.model.encode(ids, mask).state
    assert state.position.tolist() == [2, 3, 6]
    found = model.generate(ids * 0 + 1, attention_mask=mask * 0, state=state, num_beams=2, max_new_tokens=6)
    for row, document in enumerate(documents):
        single = model.generate(document, num_beams=2, max_new_tokens=6)[0]
        assert torch.equal(found[row, : len(single)], single)


@pytest.mark.each_value
@of_every_context
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("grain", "depth"), [("none", 0), ("layer", 1), ("segment", -1)])
def test_the_gradient_is_that_of_the_call_that_read_the_text(make_model, fields, schedule, grain, depth):
    """One document goes on: it has nothing in the first call, and its gradient is that of the second alone."""
    model, labels = build(make_model, fields, schedule, bptt_depth=depth).train(), random_ids(3, 4)
    model.set_gradient_checkpointing(grain)
    _, ids, mask = batch_of(LENGTHS)

    def gradients(inputs, state=None):
        model.zero_grad()
        model(**inputs, labels=labels, state=state).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients({"input_ids": ids, "attention_mask": mask})
    is_first = mask.clone()
    is_first[1] = 0
    state = model.model.encode(ids, is_first, state=RecurrentState.unread(model.config, 3)).state
    is_second = mask - is_first
    found = gradients({"input_ids": ids, "attention_mask": is_second}, state)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("most", [-1, 2])
def test_a_finished_section_is_shown_until_more_is_read(make_model, most):
    model = make_model(decoder_context="section", context_segments=most)
    ids, labels = random_ids(2, 5, 8), random_ids(2, 5, 4)
    labels[0, [0, 1, 3]] = labels[1, [1, 2]] = -100
    first = model(input_ids=ids[:, :3], labels=labels[:, :3])
    nothing = {"input_ids": ids[:, :2], "attention_mask": torch.zeros(2, 2, 8)}
    again = model(**nothing, labels=labels[:, 2].clamp(min=4), state=first.state)
    torch.testing.assert_close(again.logits[0], first.logits[0, 2], rtol=0, atol=1e-12)
    # the second document is inside a section, which began at index 1
    inside = model(input_ids=ids[1:, 1:3], labels=labels[1:, 2].clamp(min=4), state=model.model.encode(
        ids[1:, :1], target_segments=torch.ones(1, 1).bool()).state)  # fmt: skip
    torch.testing.assert_close(again.logits[1], inside.logits[0], rtol=0, atol=1e-12)
    whole = model(input_ids=ids, labels=labels).logits[:, 3:]
    for state in (first.state, again.state):
        rest = model(input_ids=ids[:, 3:], labels=labels[:, 3:], state=state).logits
        torch.testing.assert_close(rest, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["last", "memory", "section", "all"])
def test_a_state_with_ended_documents_does_not_grow(make_model, name):
    model = make_model(decoder_context=name, context_segments=2)
    state, ids, sizes = model.model.encode(random_ids(3, 2, 8)).state, random_ids(3, 1, 8), []
    mask = torch.ones_like(ids)
    mask[1] = 0
    for t in range(6):
        state = model.model.encode(ids, mask * (t != 3), state=state).state
        sizes.append(sum(part.shape[1] for part in (state.context, state.tokens) if part is not None))
    assert sizes[1:] == [sizes[1]] * 5


@pytest.mark.parametrize("fields", [{}, {"decoder_context": "all"}], ids=["last", "all"])
def test_documents_without_any_text_are_not_decoded(make_model, fields):
    """Check a state before the first segment, and a state without the decoder's context."""
    model, mask = make_model(**fields), torch.zeros(2, 1, 8)
    mask[0] = 1
    inputs = {"input_ids": random_ids(2, 1, 8), "attention_mask": mask}
    unread = RecurrentState.unread(model.config, 2)
    whole = model.model.encode(random_ids(2, 1, 8)).state
    for state in (unread, RecurrentState(whole.position, whole.memory)):
        with pytest.raises(ValueError, match="attention_mask: row 1 has no tokens"):
            model(**inputs, labels=random_ids(2, 4), state=state)
        with pytest.raises(ValueError, match="attention_mask: row 1 has no tokens"):
            model.generate(**inputs, state=state, max_new_tokens=3)
    # a reader of several texts may wait for one of them
    assert model.model.encode(**inputs, state=unread).state.position.tolist() == [1, 0]
