"""Truncated BPTT of a state that is given with a graph, compared with autograd on the naive reference.

Documents have different numbers of segments in this call, with empty segments in front of them or behind.
"""

import pytest
import torch

from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from reference import encode
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
