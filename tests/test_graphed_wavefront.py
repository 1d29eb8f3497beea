"""Replayed diagonals give the numbers of the sequential schedule; a graph is the work itself, on a processor."""

import pytest
import torch

from played_graphs import play_graphs
from recurrent_bart import graphed_wavefront, schedules
from tiny import batch_of, random_ids, tiny_model

FIELDS = {
    "gated": {},
    "concat": {"prefix_attention": "concat"},
    "own projection": {"prefix_projection": False, "update_gate": False},
    "windows": {"bptt_depth": 1},
    "memory": {"decoder_context": "memory", "bptt_depth": 1},
}


@pytest.fixture
def recordings(monkeypatch):
    """Recordings on a processor; each as it is made."""
    monkeypatch.setattr(schedules, "is_faster_by_diagonals", lambda segments: True)
    monkeypatch.setattr(schedules, "can_graph", lambda *batch: True)
    return play_graphs(monkeypatch, graphed_wavefront)


def build(schedule, **fields):
    torch.manual_seed(0)
    return tiny_model(schedule=schedule, **fields).double().train()


def steps(model, task):
    """Losses and gradients of two steps, the second of other documents and changed weights."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, input_ids, mask = batch_of([[8, 8, 3, 8, 7], [5], [8, 2, 1]])
        labels = random_ids(3, 5, 4).masked_fill(~mask.bool()[:, :, :1], -100)
        model.zero_grad()
        labels = labels if task == "sections" else labels[:, 0]
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.9)
    return found


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_numbers_are_the_sequential_ones(recordings, fields, task):
    expected = steps(build("sequential", **fields), task)
    assert not recordings
    torch.testing.assert_close(steps(build("auto", **fields), task), expected, rtol=0, atol=1e-10)
    assert recordings
