"""Several runs take turns in one process: each gives the result it gives alone."""

import itertools
import json
import math

import pytest
import torch

from recurrent_bart.studies.memory.single_run import execute
from recurrent_bart.studies.memory.turns import take_turns
from study_runs import MODEL, all_turns, begun, short_run

CPU = torch.device("cpu")
# fields that differ between two equal runs
TIMES = ("seconds", "seconds_to_reach")


def without_times(record):
    curve = [{name: value for name, value in point.items() if name not in TIMES} for point in record["curve"]]
    return {name: value for name, value in record.items() if name not in TIMES} | {"curve": curve}


def counting(log):
    def begin(item):
        for number in range(item):
            log.append((item, number))
            yield

    return begin


@pytest.mark.slow
def test_each_has_a_turn_and_the_next_comes_when_one_has_ended():
    log = []
    ended = [item for item, error in take_turns([3, 1, 2], counting(log), 2, CPU) if error is None]
    assert log == [(3, 0), (1, 0), (3, 1), (3, 2), (2, 0), (2, 1)]
    assert ended == [1, 3, 2]


def test_items_are_asked_for_when_there_is_room_for_them():
    asked = []
    items = (asked.append(item) or item for item in itertools.repeat(2))
    turns = take_turns(items, counting([]), 3, CPU)
    next(turns)
    assert len(asked) == 3


@pytest.mark.slow
def test_work_that_fails_is_told_in_a_line_and_leaves_the_others_alone(capsys):
    def begin(item):
        yield
        if item == "bad":
            raise RuntimeError("out of\nmemory")
        yield

    ended = dict(take_turns(["good", "bad", "last"], begin, 2, CPU))
    assert ended == {"good": None, "bad": "RuntimeError: out of memory", "last": None}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("n_at_once", [2, 3])
def test_runs_beside_each_other_are_what_each_is_alone(tmp_path, n_at_once):
    runs = [short_run(seed=0), short_run(seed=1), short_run(name="top", model=MODEL | {"recurrence": "top"})]
    alone = begun(tmp_path / "alone", *runs)
    for file in alone:
        all_turns(execute(file, CPU, math.inf))
    together = begun(tmp_path / "together", *runs)
    ended = list(take_turns(together, lambda file: execute(file, CPU, math.inf), n_at_once, CPU))
    assert {file for file, error in ended if error is None} == set(together)
    for one, other in zip(alone, together, strict=True):
        # equal to the last bit
        assert json.dumps(without_times(one.read())) == json.dumps(without_times(other.read()))


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_neighbour_alone(tmp_path):
    good, bad = begun(tmp_path, short_run(), short_run(name="bad", model=MODEL | {"encoder_attention_heads": 5}))
    ended = dict(take_turns([bad, good], lambda file: execute(file, CPU, math.inf), 2, CPU))
    assert ended[good] is None
    assert "heads" in ended[bad]
    assert good.is_finished(short_run())
    assert "stopped" not in bad.read()
