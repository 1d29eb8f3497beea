"""Results of the training benchmark: parsed log, derived metrics, order of launches."""

from pathlib import Path

import pytest

from recurrent_bart.benchmarks.training.results import (
    MEASURED,
    Launch,
    LoopCost,
    Speed,
    empty_results,
    lines_of,
    plan,
)

ZERO2, ZERO3 = Path("some/zero2.json"), Path("zero3.json")


def line(step, tokens_per_second, step_seconds, data_seconds=0.0, memory=1):
    return {
        "step": step,
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "data_seconds": data_seconds,
        "memory_allocated_bytes": memory,
    }


def test_steps_of_the_warm_up_and_other_lines_are_left_out():
    records = [{"step": 0, "validation_loss": 1.0}, line(1, 5, 9.0), line(2, 10, 4.0, 1.0, 7), line(3, 40, 1.0, 0.5, 3)]
    speed = Speed.of([*records, line(4, 20, 2.0, 0.25)], n_warmup=1, log_every=1)
    assert (speed.outcome, speed.tokens_per_second, speed.peak_bytes) == (MEASURED, [10, 40, 20], 7)
    assert speed.metrics() == {"tokens_per_second": 20, "step_seconds": 2.0, "spread": 4.0, "waiting": 1.75 / 7}


def test_a_line_that_the_warm_up_reaches_into_is_left_out():
    records = [line(4, 1, 1.0), line(8, 2, 1.0)]
    assert Speed.of(records, n_warmup=4, log_every=4).tokens_per_second == [2]
    with pytest.raises(ValueError, match="the log has no line after the 5 steps of --warmup"):
        Speed.of(records, n_warmup=5, log_every=4)


def test_what_the_loop_costs_is_the_median_over_rounds():
    # the second round is an outlier
    cost = LoopCost(MEASURED, trainer_seconds=[1.1, 3.0, 1.0], bare_seconds=[1.0, 2.0, 1.25])
    figures = cost.metrics()
    assert figures["cost"] == pytest.approx(0.1)
    assert (figures["least_cost"], figures["most_cost"]) == (pytest.approx(-0.2), pytest.approx(0.5))
    assert (figures["trainer_step_seconds"], figures["bare_step_seconds"]) == (1.1, 1.25)


def test_the_most_processes_come_first_and_the_loop_is_measured_at_both_ends():
    launches = plan(["runs", "loop"], [1, 2, 4], [ZERO2, ZERO3])
    assert [launch.name() for launch in launches] == [
        *("runs-4-zero2", "runs-4-zero3", "runs-1-zero2", "runs-1-zero3", "runs-2-zero2", "runs-2-zero3"),
        *("loop-4-zero2", "loop-4-zero3", "loop-1-zero2", "loop-1-zero3"),
    ]
    assert plan(["loop"], [2, 2], [ZERO3]) == [Launch("loop", 2, ZERO3)]


def test_the_file_has_a_line_for_each_start():
    results = empty_results(plan(["runs", "loop"], [1], [ZERO2]))
    results[Launch("loop", 1, ZERO2)] = LoopCost(MEASURED, [1.5], [1.0])
    runs, loop = lines_of(results)
    assert (runs["part"], runs["processes"], runs["sharding"], runs["figures"]) == ("runs", 1, "zero2", None)
    assert runs["outcome"] == "not measured: the time limit is reached"
    assert loop["figures"]["cost"] == 0.5
    assert loop["measured"] == {"trainer_seconds": [1.5], "bare_seconds": [1.0]}
