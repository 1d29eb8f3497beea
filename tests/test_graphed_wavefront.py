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


@pytest.mark.parametrize("without_graph", [torch.no_grad, torch.inference_mode])
def test_reading_records_what_comes_back(recordings, without_graph):
    """4 layers: of 5 segments 7 spans of them, of 2 segments one more that was not among those."""
    expected, model = (build(schedule, encoder_layers=4).eval() for schedule in ("sequential", "auto"))
    made = []
    for n_segments in (5, 5, 5, 2, 2):
        ids = random_ids(2, n_segments, 8)
        with without_graph():
            found, plain = model.model.encode(ids), expected.model.encode(ids)
        torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.state.memory, plain.state.memory, rtol=0, atol=1e-10)
        made.append(len(recordings))
    assert made == [0, 7, 7, 7, 8]


def test_training_records_at_first_sight_also_what_has_no_graph(recordings):
    """4 segments before the window: 5 spans, forwards; the window: 4 of these, backwards."""
    model = build("auto", bptt_depth=1)
    model(input_ids=random_ids(2, 6, 8), labels=random_ids(2, 4)).loss.backward()
    assert len(recordings) == 9
    model(input_ids=random_ids(2, 6, 8), labels=random_ids(2, 4)).loss.backward()
    assert len(recordings) == 9
