"""Tests of the generation benchmark."""

import json

import pytest
import torch

from launching import load_script
from recurrent_bart.benchmarks.generation import measure
from recurrent_bart.benchmarks.generation.cases import GenerationCase, build_cases
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting

FLAGS = ["--suite", "generation", "--model_size", "tiny", "--device", "cpu", "--rounds", "1", "--passes", "1"]
TINY = BenchmarkSetting("tiny", 16, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark")


@pytest.mark.slow
def test_a_run_measures_each_loop_and_writes_records(script, tmp_path, capsys):
    sizes = ["--batch_sizes", "1", "2", "--contexts", "8", "--new_tokens", "5", "--warmup", "1"]
    assert script.main([*FLAGS, *sizes, "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    records = written["results"]
    assert written["command"][:2] == ["--suite", "generation"]
    found = {(record["loop"], record["num_beams"], record["batch_size"]) for record in records}
    assert found == {(loop, beams, size) for loop in ("ours", "eager") for beams in (1, 4) for size in (1, 2)}
    assert all(record["outcome"] == "measured" and record["equal_ids"] == 1.0 for record in records)
    for record in records:
        expected = record["batch_size"] * 5 / record["call_seconds"][0]
        assert record["tokens_per_second"] == pytest.approx(expected)
        assert 0 < record["share_of_limit"] < 1
        assert record["call_bytes"] > 0
    assert {record["speed_up"] for record in records if record["loop"] == "eager"} == {1.0}
    assert "Hugging Face, eager" in capsys.readouterr().out


def test_one_loop_is_measured_alone(script, tmp_path):
    flags = [*FLAGS, "--loops", "ours", "--num_beams", "1", "--contexts", "8", "--new_tokens", "2", "--warmup", "0"]
    assert script.main([*flags, "--output_dir", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (record["loop"], record["outcome"]) == ("ours", "measured")


def test_wrong_ids_are_not_timed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "find_wrong_ids", lambda setting: ["ids differ"])
    assert script.main([*FLAGS, "--output_dir", str(tmp_path)]) == 1
    assert "error: ids differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_loop_is_found(monkeypatch):
    assert measure.find_wrong_ids(TINY) == []
    options = GenerationCase.options
    wrong = {"suppress_tokens": list(range(3, 90))}
    monkeypatch.setattr(GenerationCase, "options", lambda case: options(case) | (wrong if case.loop == "ours" else {}))
    assert len(measure.find_wrong_ids(TINY)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_sizes", "4", "0"], "--batch_sizes [4, 0]: must be at least 1"),
        (["--new_tokens", "2000"], "--new_tokens 2000: must be at most 1024"),
    ],
)
def test_impossible_sizes_are_errors(script, capsys, flags, message):
    assert script.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_only_a_gpu_has_a_compiled_static_cache():
    loops = [[case.loop for case in build_cases([1, 4], [2], [8], 5, is_gpu)] for is_gpu in (False, True)]
    assert loops == [["ours", "eager"] * 2, ["ours", "eager", "static", "ours", "eager"]]


def test_the_limit_counts_weights_and_caches():
    models = measure.GenerationModels(TINY)
    # 2 layers of width 128: 5 attention maps are read each step (the context's key and value maps only once),
    # two maps of the feed-forward block, 3 norms, and the vocabulary's map
    layer = 6 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 3 * 2 * 128
    weights = 2 * layer + 4096 * 128
    one = GenerationCase("ours", 1, 1, 10, 1)
    context, own, projections = 2 * 2 * 128 * 10, 2 * 2 * 128, 2 * 2 * (128 * 128 + 128)
    assert models.limit_seconds(one, 4.0) == weights + 2 * context + own + projections
    more = GenerationCase("ours", 4, 3, 10, 1)
    assert models.limit_seconds(more, 4.0) == weights + 6 * context + 12 * own + projections


def test_a_full_memory_is_an_outcome(monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("full")

    case = GenerationCase("ours", 1, 1, 4, 2)
    monkeypatch.setattr(measure.GenerationModels, "generator", lambda self, case: lambda: fail(self))
    results = measure.run_cases([case], TINY, measure.Effort(2, 1, 1), lambda found: None)
    assert results[case].outcome == "out of memory"
