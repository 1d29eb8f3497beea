"""The figures of the benchmark are of the passes that the trainer runs."""

import pytest
import torch

from recurrent_bart import wavefront
from recurrent_bart.training.benchmark import Benchmark, Case, all_cases


@pytest.fixture(scope="module")
def benchmark():
    return Benchmark("tiny", 16, batch_size=1, device=torch.device("cpu"), dtype=torch.float32, n_passes=0)


def peaks(benchmark, *case, numbers=(2, 6)):
    return [measured.peak_bytes for measured in benchmark.run(Case(*case), numbers)]


def test_memory_of_windows_does_not_grow_with_the_document(benchmark):
    """Beyond the ids and labels, and for a single target the embeddings, of the segments that there are more."""
    few, many = peaks(benchmark, "sections", 0, "none")
    assert many - few < 4 * (16 + 64) * 8 * 4
    few, many = peaks(benchmark, "document", 0, "none")
    assert many - few <= 4 * 16 * 128 * 4 * 2


def test_memory_of_full_backpropagation_grows_less_with_checkpointing(benchmark):
    growth = {}
    for grain in ("none", "layer", "segment"):
        few, many = peaks(benchmark, "document", -1, grain, numbers=(16, 48))
        growth[grain] = many - few
    assert growth["none"] > 3 * growth["layer"] > 3 * growth["segment"] > 0


def test_passes_are_timed(benchmark):
    timed = Benchmark("tiny", 16, batch_size=2, device=torch.device("cpu"), dtype=torch.float32, n_passes=2)
    (measured,) = timed.run(Case("document", 0, "none"), [3])
    assert measured.n_segments == 3
    assert measured.tokens_per_second == pytest.approx(2 * 3 * 16 / measured.seconds)
    assert measured.spread >= 1


def test_schedules_are_timed_side_by_side():
    cases = all_cases(["document"], [-1], ["none"], ["sequential", "wavefront"])
    assert cases == [Case("document", -1, "none", "sequential"), Case("document", -1, "none", "wavefront")]
    assert len(set(all_cases())) == 2 * 3 * 3


def test_the_schedule_of_a_case_is_the_one_that_runs(benchmark, monkeypatch):
    calls = []
    step = wavefront.diagonal_step
    monkeypatch.setattr(wavefront, "diagonal_step", lambda *inputs: calls.append(1) or step(*inputs))
    peaks(benchmark, "document", -1, "none", "sequential")
    assert not calls
    peaks(benchmark, "document", -1, "none", "wavefront")
    assert calls
