"""`launch/training_speed.py` with several real processes: output and error messages."""

import json
import os
import sys
from pathlib import Path

import pytest

from launching import TESTS, assert_one_error, load_script

ZERO3 = TESTS.parent / "ds_configs" / "zero3.json"
SMALL = ["--segment_size", "16", "--vocab_size", "300", "--dataloader_num_workers", "0"]


@pytest.fixture(scope="module")
def script():
    return load_script("training_speed")


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_are_measured_without_wandb_and_leave_no_model_behind(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("raise ImportError('not there')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, TESTS.parent))))
    flags = ["--processes", "2", "--deepspeed", str(ZERO3), "--parts", "runs", "--steps", "3", "--warmup", "1", *SMALL]
    flags += ["--output_dir", str(tmp_path / "out")]
    code, output = script.main(flags), capsys.readouterr().out
    assert code == 0, output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    (line,) = written["results"]
    assert (line["part"], line["processes"], line["sharding"], line["outcome"]) == ("runs", 2, "zero3", "measured")
    assert len(line["measured"]["step_seconds"]) == 2
    # Two ranks read two documents of two segments each.
    seconds, speeds = line["measured"]["step_seconds"], line["measured"]["tokens_per_second"]
    assert [a * b for a, b in zip(seconds, speeds, strict=True)] == pytest.approx([2 * 2 * 2 * 16] * 2)
    assert written["command"] == flags
    assert f"{line['figures']['tokens_per_second']:,.0f}" in output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.json", "runs-2-zero3.log"]


def test_what_there_is_no_time_for_is_named(script, tmp_path, capsys):
    assert script.main(["--budget_seconds", "0", "--processes", "1", "2", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    # The message is on a separate line and in the table.
    assert printed.count("not measured: the time limit is reached") == 2 * 8
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 8


def test_one_that_fails_decides_the_exit_code(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "command_of", lambda *_, **__: [sys.executable, "-c", "exit('no room')"])
    flags = ["--parts", "loop", "--processes", "1", "--deepspeed", str(ZERO3)]
    assert script.main([*flags, "--output_dir", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("failed, exit code 1: no room") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes 0"),
        (["--deepspeed", "a/x.json", "b/x.json"], "--deepspeed a/x.json b/x.json"),
        (["--max_steps", "3"], "--max_steps: the benchmark sets this flag"),
        (["--modelsize", "base"], "did you mean --model_size"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(script, tmp_path, capsys, flags, message):
    assert script.main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert_one_error(capsys.readouterr(), message)
    assert not Path(tmp_path / "out").exists()


def test_every_start_has_the_same_threads(script):
    loop = script.Launch("loop", 2, ZERO3)
    command = script.command_of(loop, ["--seed", "1"], Path("file"), n_rounds=5, n_threads=3)
    assert command[:2] == ["env", "OMP_NUM_THREADS=3"]
    assert command[-10:] == [
        "--nproc_per_node=2",
        "-m",
        "recurrent_bart_cli",
        "training-speed",
        script.WORKER,
        "loop",
        "file",
        "5",
        "--seed",
        "1",
    ]


def test_powers_of_two_are_measured_up_to_the_gpus_there_are(script, monkeypatch):
    assert script.find_processes(None) == [1, 2]
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 6)
    assert script.find_processes(None) == [1, 2, 4]
    assert script.find_processes([6]) == [6]
    with pytest.raises(ValueError, match="--processes 8: must be at least 1, and at most 6, the number of GPUs"):
        script.find_processes([8])
