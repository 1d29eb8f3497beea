"""Output of `launch/benchmark.py`, and the packages that it can do without."""

import json
import sys
from pathlib import Path

import pytest

from launching import load_script, run
from recurrent_bart.benchmarks.models import session
from recurrent_bart.benchmarks.models.cases import MODELS

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark.py"
SHORT = ["--segment_size", "16", "--rounds", "1", "--passes", "1", "--device", "cpu"]
# Packages that may be missing on a machine for benchmarks.
ABSENT = ("deepspeed", "datasets", "wandb", "sentencepiece", "rouge_score", "tensorboardX", "peft")


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark")


@pytest.mark.slow
def test_every_model_is_measured_in_one_run_without_what_training_needs(tmp_path):
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv = ["benchmark.py", *{[*SHORT, "--suite", "quick", "--output_dir", str(tmp_path)]}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    code, output = run([sys.executable, "-c", program], timeout=240)
    assert code == 0, output
    written = json.loads((tmp_path / "results.json").read_text())
    assert {line["model"] for line in written["results"]} == set(MODELS)
    assert {line["work"] for line in written["results"]} == {"training", "inference", "generation"}
    assert all(line["outcome"] == "measured" and line["tokens_per_second"] > 0 for line in written["results"])
    assert {"throughput.png", "memory.png"} <= {file.name for file in tmp_path.iterdir()}
    assert "LongT5" in output
    assert "of peak" in output


@pytest.mark.slow
def test_groups_and_models_can_be_picked(script, tmp_path, monkeypatch, capsys):
    # The bfloat16 measurement takes half a minute on CPU.
    monkeypatch.setattr(session, "matrix_peak", lambda device, dtype: 1e9)
    picked = ["--suite", "grid", "--segments", "1", "3", "--groups", "training-1x3", "--models", "rmt"]
    assert script.main([*picked, *SHORT, "--bf16", "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert written["command"][:2] == ["--suite", "grid"]
    assert {(line["group"], line["model"], line["n_segments"]) for line in written["results"]} == {
        ("training-1x3", "rmt", 3)
    }
    assert "RMT on BART" in capsys.readouterr().out


def test_what_computes_something_else_is_not_timed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "find_wrong_results", lambda device: ["ours: wrong"])
    assert script.main([*SHORT, "--output_dir", str(tmp_path)]) == 1
    assert "error: ours: wrong" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_group_that_is_not_there_is_an_error(script, capsys):
    assert script.main(["--groups", "inference", "nothing"]) == 2
    assert (
        "--groups nothing: unknown; the suite has the groups length, inference, generation" in capsys.readouterr().err
    )
    assert script.main(["--suite", "memory", "--models", "led"]) == 2
    assert "no case" in capsys.readouterr().err


def test_cases_with_a_cuda_graph_run_on_a_gpu_only(script):
    def peers(*flags):
        flags = "--suite", "headline", "--groups", "peers", *flags
        (group,) = script.chosen_groups(script.build_parser().parse_args(list(flags)))
        return group.cases

    on_gpu, on_cpu = peers("--device", "cuda:0"), peers("--device", "cpu")
    assert {case.model for case in on_gpu if case.graphed} == {"rmt", "segenc", "bart"}
    assert on_cpu == tuple(case for case in on_gpu if not case.graphed)
    assert {case.model for case in peers("--device", "cuda", "--models", "segenc")} == {"segenc"}


def test_the_headline_is_of_large_models_and_others_of_tiny_ones(script):
    def setting(*flags):
        return script.setting_of(script.build_parser().parse_args(list(flags)))

    assert (setting("--suite", "headline").model_size, setting("--suite", "headline").segment_size) == ("large", 512)
    assert (setting().model_size, setting().segment_size) == ("tiny", 256)
    assert setting("--suite", "headline", "--model_size", "base").model_size == "base"
