"""Training loop and bare steps: order of the rounds and number of the steps."""

import itertools
import json
from pathlib import Path

import deepspeed
import pytest
import torch

from launching import TESTS, load_script
from recurrent_bart.benchmarks.training import loop_cost
from recurrent_bart.benchmarks.training.loop_cost import in_turns, measure_loop
from recurrent_bart.benchmarks.training.results import Launch
from recurrent_bart.benchmarks.training.workloads import Work
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.trainer import Trainer

SMALL = ("--segment_size", "16", "--vocab_size", "300", "--dataloader_num_workers", "0", "--log_every", "2")
ZERO3 = Launch("loop", 1, TESTS.parent / "ds_configs" / "zero3.json")


@pytest.fixture
def flags(tmp_path):
    """Return a function that makes the flags of a small run; its documents are in the test's folder."""

    def make(*given):
        work = Work("cpu", (*SMALL, *given), steps=2, warmup=0, rounds=1)
        work.documents(most_processes=1).write(tmp_path)
        return work.flags(ZERO3, tmp_path)

    return make


def test_who_goes_first_in_one_round_goes_last_in_the_next():
    calls = []
    contestants = [lambda: calls.append("a"), lambda: calls.append("b")]
    rounds = list(itertools.islice(in_turns(contestants, torch.device("cpu")), 3))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in rounds)


@pytest.mark.slow
def test_both_loops_make_as_many_steps_on_one_sharded_engine(tmp_path, flags, monkeypatch):
    steps = {"all": 0, "trainer": 0, "logged": 0}

    def count(owner, name, what):
        whole = getattr(owner, name)

        def counted(*arguments, **named):
            steps[what] += 1
            return whole(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(deepspeed.DeepSpeedEngine, "step", "all")
    count(Trainer, "train_step", "trainer")
    count(loop_cost.LoopSession, "log", "logged")
    script, file = load_script("training_speed"), tmp_path / "found.json"
    assert script.main([script.WORKER, "loop", str(file), "3", *flags()]) == 0
    found = json.loads(file.read_text())
    assert found["outcome"] == "measured"
    # one warm-up round and three measured rounds
    assert steps == {"all": 16, "trainer": 8, "logged": 4}
    assert len(found["trainer_seconds"]) == len(found["bare_seconds"]) == 3
    folder = tmp_path / ZERO3.name()
    assert json.loads((folder / "config.json").read_text())["deepspeed"]["zero_optimization"]["stage"] == 3
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6, 8]
    assert not Path(folder / "checkpoints").exists()


@pytest.mark.slow
def test_a_step_of_several_passes_has_no_bare_one_beside_it(flags, alone):
    arguments = parse_arguments(flags("--gradient_accumulation_steps", "2"))
    with pytest.raises(ValueError, match="one forward and one backward pass"):
        measure_loop(arguments, alone, 1)
