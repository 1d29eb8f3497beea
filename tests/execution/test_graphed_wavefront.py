"""Replayed diagonals equal the sequential schedule; on a CPU, replaying a graph runs the captured function."""

from types import SimpleNamespace

import pytest
import torch

from played_graphs import play_graphs
from recurrent_bart.execution import diagonal_graphs, graphed_wavefront, grid, retained_diagonals
from tiny import DIAGONALS, random_ids, tiny_model, two_steps

LENGTHS = [[8, 8, 3, 8, 7], [5], [8, 2, 1]]


@pytest.fixture
def device_bytes():
    """Return the device's memory in bytes; with 0, no activations are kept."""
    return 0


@pytest.fixture
def graphs(monkeypatch, device_bytes):
    """Capture on a CPU; return the growing list of graphs."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: device_bytes)
    monkeypatch.setattr(grid, "is_wavefront_faster", lambda segments: True)
    monkeypatch.setattr(grid, "can_graph", lambda *batch: True)
    return play_graphs(monkeypatch, diagonal_graphs, retained_diagonals)


def build(schedule, **fields):
    torch.manual_seed(0)
    return tiny_model(schedule=schedule, **fields).double().train()


@pytest.mark.slow
@pytest.mark.parametrize("device_bytes", [0, 700_000, 2**40], ids=["none", "some", "all"])
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", DIAGONALS.values(), ids=DIAGONALS)
def test_numbers_are_the_sequential_ones(graphs, fields, task):
    expected = two_steps(build("sequential", **fields), LENGTHS, task)
    assert not graphs
    torch.testing.assert_close(two_steps(build("auto", **fields), LENGTHS, task), expected, rtol=0, atol=1e-10)
    assert graphs


@pytest.mark.parametrize("without_graph", [torch.no_grad, torch.inference_mode])
def test_reading_records_what_comes_back(graphs, without_graph):
    """4 layers and 5 segments have 7 spans of layers; 2 segments add one span."""
    expected, model = (build(schedule, encoder_layers=4).eval() for schedule in ("sequential", "auto"))
    made = []
    for n_segments in (5, 5, 5, 2, 2):
        ids = random_ids(2, n_segments, 8)
        with without_graph():
            found, plain = model.model.encode(ids), expected.model.encode(ids)
        torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.state.memory, plain.state.memory, rtol=0, atol=1e-10)
        made.append(len(graphs))
    assert made == [0, 7, 7, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["last", "all"])
def test_many_segments_are_read_by_one_recording(graphs, context):
    """2 layers and 52 segments have 53 diagonals; 51 have all layers, and two groups of 16 run as one graph.

    The last segment has fewer tokens.
    """
    fields = {"encoder_layers": 2, "decoder_context": context}
    expected, model = (build(schedule, **fields).eval() for schedule in ("sequential", "auto"))
    made = []
    for _ in range(3):
        ids, mask = random_ids(2, 52, 8), torch.ones(2, 52, 8, dtype=torch.long)
        mask[0, -1, 5:] = 0
        with torch.inference_mode():
            found, plain = (it.model.encode(ids, attention_mask=mask) for it in (model, expected))
        torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.state.memory, plain.state.memory, rtol=0, atol=1e-10)
        made.append(len(graphs))
    # graphs: first layer, second layer, both, both with a mask, and the group of diagonals
    assert made == [0, 5, 5]


def test_training_records_at_first_sight_also_what_has_no_graph(graphs):
    """The 4 segments before the window have 5 spans (forward graphs); the window has 4 of these (backward graphs)."""
    model = build("auto", bptt_depth=1)
    model(input_ids=random_ids(2, 6, 8), labels=random_ids(2, 4)).loss.backward()
    assert len(graphs) == 9
    model(input_ids=random_ids(2, 6, 8), labels=random_ids(2, 4)).loss.backward()
    assert len(graphs) == 9


@pytest.mark.parametrize("device_bytes", [2**40])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_pass_that_another_one_came_after_is_computed_again(graphs, order):
    """The later pass overwrites the kept activations."""
    gradients = []
    for schedule in ("sequential", "auto"):
        model = build(schedule)
        torch.manual_seed(1)
        losses = [model(input_ids=random_ids(2, 3, 8), labels=random_ids(2, 4)).loss for _ in range(2)]
        for number in order:
            losses[number].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("device_bytes", [2**40])
def test_checkpointing_keeps_nothing(graphs):
    """3 segments and 3 layers have 5 spans with two graphs each; kept activations add two more graphs per diagonal."""
    for checkpointing, n_made in (("layer", 10), ("none", 20)):
        graphs.clear()
        model = build("auto")
        model.set_gradient_checkpointing(checkpointing)
        model(input_ids=random_ids(2, 3, 8), labels=random_ids(2, 4)).loss.backward()
        assert len(graphs) == n_made


def test_processes_of_one_device_share_what_they_keep(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=90))
    assert graphed_wavefront.memory_bytes(torch.device("cuda")) == 90
    monkeypatch.setattr(graphed_wavefront, "processes_per_device", 1)
    graphed_wavefront.share_device(3)
    assert graphed_wavefront.memory_bytes(torch.device("cuda")) == 30


@pytest.mark.parametrize(
    ("shape", "checkpointing", "is_training", "expected"),
    [
        ((3, 8, 4), "none", True, True),
        ((4, 8, 4), "none", True, False),
        ((1, 25, 4), "none", True, False),
        ((4, 8, 4), "segment", True, False),
        ((4, 8, 4), "layer", True, True),
        ((4, 8, 4), "layer", False, False),
    ],
)
def test_graphs_are_for_batches_that_leave_a_gpu_idle(monkeypatch, shape, checkpointing, is_training, expected):
    monkeypatch.setattr(graphed_wavefront, "MOST_TOKENS", 24)
    monkeypatch.setattr(graphed_wavefront, "can_fuse", lambda layer, tokens: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tokens, layer = torch.zeros(shape), tiny_model().model.encoder.layers[0]
    with torch.set_grad_enabled(is_training):
        assert graphed_wavefront.can_graph(layer, {"weight": tokens}, tokens, checkpointing) == expected
        # a weight in another precision, as under autocast
        assert not graphed_wavefront.can_graph(layer, {"weight": tokens.double()}, tokens, checkpointing)
