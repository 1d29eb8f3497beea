"""Checks find models with wrong results before timing."""

import pytest
import torch

from recurrent_bart.benchmarks.models.checks import find_wrong_results
from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from recurrent_bart.execution import wavefront
from recurrent_bart.recurrence import prefix_recurrence

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
