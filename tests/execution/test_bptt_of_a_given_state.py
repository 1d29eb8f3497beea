"""Truncated BPTT of a state that is given with a graph, compared with autograd on the naive reference.

Documents have different numbers of segments in this call, with empty segments in front of them or behind.
"""

import pytest
import torch

from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from reference import context, detached_outside, encode
from tiny import random_ids

VARIANTS = {"layerwise": {}, "top": {"recurrence": "top"}, "wavefront": {"schedule": "wavefront"}}
N_SEGMENTS = 4
# segments of each document in earlier calls, and in this call
N_BEFORE, N_NOW = (2, 1, 3, 0, 2, 2), (4, 3, 2, 2, 1, 0)


@pytest.fixture
def inputs():
    """Return documents of this call as lists of ids, and the batch with empty segments in front and behind."""
    documents = [random_ids(n_segments, 8) for n_segments in N_NOW]
    ids, mask = torch.ones(2, len(N_NOW), N_SEGMENTS, 8, dtype=torch.long), torch.zeros(2, len(N_NOW), N_SEGMENTS, 8)
    for row, document in enumerate(documents):
        for side, part in enumerate((slice(N_SEGMENTS - len(document), None), slice(len(document)))):
            ids[side, row, part], mask[side, row, part] = document, 1
    return [document.tolist() for document in documents], ids, mask


def size_of(depth):
    return 10**6 if depth == -1 else depth + 1


def cuts_of(n_before, n_now, depth):
    """Return the segments before which the state is detached; a document begins with the learned state."""
    return [t for t in range(n_before == 0, n_now) if (n_now - t) % size_of(depth) == 0]


def gradients(model, loss, *leaves):
    """Return the gradients of the leaves and of the encoder's parameters, zero without a graph."""
    sources = [*leaves, *model.model.encoder.parameters()]
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, sources, strict=True)]


def check_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("grain", ["none", "layer", "segment"])
@pytest.mark.parametrize("decode_at", ["last_segment", "every_segment"])
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_empty_segments_around_a_document_do_not_cut_its_state(make_model, inputs, fields, depth, decode_at, grain):
    model = make_model(bptt_depth=depth, **fields).train()
    model.set_gradient_checkpointing(grain)
    documents, ids, mask = inputs
    shape = RecurrentState.memory_shape(model.config, len(N_NOW))
    memory = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = 0
    for row, document in enumerate(documents):
        states = None if N_BEFORE[row] == 0 else memory[row]
        after, last = encode(model, document, cuts_of(N_BEFORE[row], N_NOW[row], depth), states)
        expected = expected + torch.stack(list(last)).sin().sum()
        if decode_at == "every_segment":
            expected = expected + sum(state.cos().sum() + tokens.cos().sum() for state, tokens in after)
    expected = gradients(model, expected, memory)
    # a document that reads nothing, and one that reads a single segment within its window
    assert expected[0][5].abs().min() > 0
    assert (expected[0][4].abs().max() > 0) == (depth != 0)
    for side in range(2):
        state = RecurrentState(torch.tensor(N_BEFORE), memory)
        output = model.model.encoder(ids[side], mask[side], state=state, decode_at=decode_at)
        loss = output.state.memory.sin().sum()
        if decode_at == "every_segment":
            seen = output.last_hidden_state[output.is_read], output.context_mask[output.is_read].bool()
            loss = loss + seen[0][seen[1]].cos().sum()
        check_equal(gradients(model, loss, memory), expected)


CONTEXTS = {
    "memory": {"decoder_context": "memory"},
    "all": {"decoder_context": "all"},
    "section": {"decoder_context": "section"},
    "two of all": {"decoder_context": "all", "context_segments": 2},
    "all without state": {"decoder_context": "all", "pre_seq_len": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize("fields", CONTEXTS.values(), ids=CONTEXTS)
def test_windows_cut_a_given_context_as_they_cut_the_segments_of_this_call(
    make_model, inputs, fields, depth, task, schedule
):
    """Windows cut the context with a target per segment; with one target, the gradient reaches the whole context."""
    model = make_model(bptt_depth=depth, schedule=schedule, **fields)
    config, (documents, ids, mask) = model.config, inputs
    before, before_mask = torch.ones(len(N_NOW), 3, 8, dtype=torch.long), torch.zeros(len(N_NOW), 3, 8)
    earlier = [random_ids(n_segments, 8) for n_segments in N_BEFORE]
    for row, document in enumerate(earlier):
        before[row, : len(document)], before_mask[row, : len(document)] = document, 1
    # documents that have begun are in a section that goes on
    first = model.model.encode(before, before_mask, state=RecurrentState.unread(config, len(N_NOW))).state.detach()
    context_BAD = first.context.clone().requires_grad_()
    state = RecurrentState(**first | {"context": context_BAD})
    # with a target per segment, a document's second segment has none
    targets_of = [[t for t in range(n_now) if t != 1 or task == "document"] for n_now in N_NOW]
    expected = 0
    for row, document in enumerate(documents):
        n_before, n_now = N_BEFORE[row], N_NOW[row]
        after = []
        for number in range(1, n_before + 1):
            part = context_BAD[row, first.context_number[row].abs() == number]
            after.append((part, part))
        memory = first.memory[row] if n_before and config.has_state else None
        after += encode(model, document, cuts_of(n_before, n_now, depth), memory)[0]
        for t in targets_of[row] if task == "sections" else targets_of[row][-1:]:
            window = (n_now - 1 - t) // size_of(depth)
            begin = max(0, n_before + n_now - (window + 1) * size_of(depth)) if task == "sections" else 0
            ends = [n_before + end for end in targets_of[row]] if task == "sections" else []
            seen = context(config, detached_outside(after, begin, n_before + n_now), n_before + t, ends)
            expected = expected + seen.sin().sum()
    expected = gradients(model, expected, context_BAD)
    assert (expected[0].abs().max() > 0) == (task == "document" or depth != 0)
    for side in range(2):
        targets = None
        if task == "sections":
            targets = torch.zeros(ids[side].shape[:2]).bool()
            for row, chosen in enumerate(targets_of):
                in_front = N_SEGMENTS - N_NOW[row] if side == 0 else 0
                targets[row, [in_front + t for t in chosen]] = True
        output = model.model.encode(ids[side], mask[side], state=state, target_segments=targets)
        is_decoded = slice(None) if task == "sections" else output.is_read.any(dim=1)
        seen = output.last_hidden_state[is_decoded], output.context_mask[is_decoded].bool()
        check_equal(gradients(model, seen[0][seen[1]].sin().sum(), context_BAD), expected)
