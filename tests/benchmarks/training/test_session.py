"""A launch that fails does not stop the rest, and no launch starts without time."""

import json
import math
import sys
import time
from pathlib import Path

import pytest

from recurrent_bart.benchmarks.training.results import LEFT_OUT, MEASURED, Launch, empty_results, plan
from recurrent_bart.benchmarks.training.session import Starter
from recurrent_bart.benchmarks.training.workloads import Work

GOOD, BAD, MUTE = Path("good.json"), Path("bad.json"), Path("mute.json")
LINE = {"step": 2, "tokens_per_second": 5.0, "step_seconds": 1.0, "data_seconds": 0.0, "memory_allocated_bytes": 1}
PROGRAM = """
import sys
from pathlib import Path
file, text = Path(sys.argv[1]), sys.argv[2]
file.parent.mkdir(exist_ok=True)
file.write_text(text)
"""


def command(launch, flags, file):
    """Return a program that writes a run's output, fails, or writes nothing."""
    if launch.sharding == BAD:
        return [sys.executable, "-c", "exit('no room')"]
    if launch.sharding == MUTE:
        return ["true"]
    if launch.part == "loop":
        found = json.dumps({"outcome": MEASURED, "trainer_seconds": [2.0], "bare_seconds": [1.0]})
        return [sys.executable, "-c", PROGRAM, file, found]
    folder = Path(flags[flags.index("--output_dir") + 1])
    return [sys.executable, "-c", PROGRAM, folder / "metrics.jsonl", json.dumps(LINE)]


@pytest.fixture
def starter(tmp_path):
    return Starter(Work("cpu", (), steps=2, warmup=1, rounds=1), tmp_path / "work", tmp_path, command, 60)


def test_one_that_fails_or_leaves_nothing_leaves_the_others_alone(starter, tmp_path):
    results = empty_results(plan(["runs", "loop"], [1], [BAD, MUTE, GOOD]))
    kept = []
    starter.fill(results, math.inf, kept.append)
    assert kept == list(results)
    for part in ("runs", "loop"):
        assert results[Launch(part, 1, BAD)].outcome == "failed, exit code 1: no room"
        assert results[Launch(part, 1, MUTE)].outcome.startswith("failed, ")
        assert results[Launch(part, 1, GOOD)].outcome == MEASURED
    assert results[Launch("runs", 1, GOOD)].tokens_per_second == [5.0]
    assert results[Launch("loop", 1, GOOD)].metrics()["cost"] == 1.0
    assert (tmp_path / "runs-1-bad.log").read_text() == "no room\n"


def test_run_folders_do_not_pile_up(starter):
    results = empty_results(plan(["runs"], [1], [GOOD]))
    starter.fill(results, math.inf, lambda _: None)
    assert results[Launch("runs", 1, GOOD)].outcome == MEASURED
    assert sorted(path.name for path in starter.place.iterdir()) == ["tokenizer", "train.jsonl", "validation.jsonl"]


def test_what_there_is_no_time_for_is_not_begun(starter):
    results = empty_results(plan(["runs"], [1, 2], [GOOD]))
    starter.fill(results, time.monotonic(), lambda _: None)
    assert {found.outcome for found in results.values()} == {LEFT_OUT}
