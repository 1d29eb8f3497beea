"""Checks find models with wrong results before timing."""

import pytest
import torch

from played_graphs import play_graphs
from recurrent_bart.benchmarks.models import captured
from recurrent_bart.benchmarks.models.checks import find_wrong_graphs, find_wrong_results
from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from recurrent_bart.execution import wavefront
from recurrent_bart.execution.grid import Grid
from recurrent_bart.recurrence import prefix_recurrence
from tiny import random_ids

CPU = torch.device("cpu")


@pytest.mark.slow
def test_nothing_is_wrong():
    assert find_wrong_results(CPU) == []


@pytest.mark.slow
def test_a_schedule_with_other_numbers_is_found(monkeypatch):
    step = wavefront.diagonal_step

    def wrong(*inputs):
        first, *others = step(*inputs)
        return first * 1.001, *others

    monkeypatch.setattr(wavefront, "diagonal_step", wrong)
    faults = find_wrong_results(CPU)
    assert len(faults) == 3
    assert all(fault.startswith("ours, wavefront") for fault in faults)


def test_a_state_that_is_not_carried_is_found(monkeypatch):
    recurrence = prefix_recurrence.PrefixRecurrence
    monkeypatch.setattr(recurrence, "next_state", lambda self, memory, *inputs: memory)
    assert "ours: the loss ignores the first segment" in find_wrong_results(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("bptt_depth", [0, 2])
def test_a_memory_that_gradient_does_not_reach_is_found(monkeypatch, bptt_depth):
    encode = RecurrentMemoryBart.encode

    def cut(self, ids):
        self.bptt_depth = bptt_depth
        return encode(self, ids)

    monkeypatch.setattr(RecurrentMemoryBart, "encode", cut)
    assert any("RMT" in fault for fault in find_wrong_results(CPU))


def test_a_memory_that_is_not_carried_is_found(monkeypatch):
    encode = RecurrentMemoryBart.encode
    monkeypatch.setattr(RecurrentMemoryBart, "encode", lambda self, ids: encode(self, ids[:, -1:]))
    assert "RMT: the loss ignores the first segment" in find_wrong_results(CPU)


@pytest.mark.slow
def test_segments_without_a_state_that_differ_from_segenc_are_found(monkeypatch):
    segment = Grid._segment

    def wrong(self, tokens, *inputs):
        return segment(self, tokens * (1 if self.recurrence else 1.001), *inputs)

    monkeypatch.setattr(Grid, "_segment", wrong)
    faults = find_wrong_results(CPU)
    assert len(faults) == 3
    assert all("no state" in fault and fault.endswith("from SegEnc") for fault in faults)


def test_a_graph_that_computes_what_its_model_computes_is_right(monkeypatch):
    graphs = play_graphs(monkeypatch, captured)
    assert find_wrong_graphs(CPU, random_ids(2, 3, 8), random_ids(2, 6)) == []
    # a step and a reading of each model
    assert len(graphs) == 6


def test_a_graph_that_does_not_read_the_new_batch_is_found(monkeypatch):
    play_graphs(monkeypatch, captured)
    monkeypatch.setattr(captured.CapturedFunction, "__call__", lambda self: self._outputs)
    faults = find_wrong_graphs(CPU, random_ids(2, 3, 8), random_ids(2, 6))
    assert [fault.split(":")[0].split(",")[0] for fault in faults] == ["RMT"] * 2 + ["SegEnc"] * 2 + ["BART"] * 2


@pytest.mark.gpu
def test_nothing_is_wrong_on_a_gpu():
    assert find_wrong_results(torch.device("cuda")) == []
