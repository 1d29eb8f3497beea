"""A report states the content of the run files."""

import json

import matplotlib.image
import pytest

from recurrent_bart.studies.report import accuracy_table, cost_table, draw, origin, read_results, report
from study_runs import record_of, short_run

RUNS = [
    short_run(name="another"),
    *(short_run(seed=seed) for seed in range(3)),
    short_run(name="unfinished"),
    short_run(task={"name": "recall"}),
]


@pytest.fixture
def folder(tmp_path):
    """Write three seeds of a variant (one cut off), another variant, and an unfinished run."""
    accuracies = [0.7, 0.9, 1.0]
    for seed, accuracy in enumerate(accuracies):
        run = short_run(seed=seed)
        stopped = {"stopped": "learnt"} if accuracy == 1.0 else {}
        reached = {"steps_to_reach": None} if accuracy == 0.7 else {"steps_to_reach": 100 * seed}
        write(tmp_path, run, record_of(run, accuracy, **stopped, **reached))
    other = short_run(name="another")
    write(tmp_path, other, record_of(other, 0.25, stopped="budget", steps_to_reach=None, peak_bytes=None))
    write(tmp_path, short_run(name="unfinished"), {"run": vars(short_run(name="unfinished"))})
    return tmp_path


def write(folder, run, record):
    (folder / run.file_name()).write_text(json.dumps(record))


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_accuracy_is_the_mean_and_range_over_seeds(folder):
    head, _, another, layerwise = rows(accuracy_table(read_results(folder, RUNS), "token_accuracy"))
    assert head == ["task", "model", "seeds", "1", "2", "4"]
    assert another[1:] == ["another", "1", "0.250", "0.250", "0.250"]
    assert layerwise[1:] == ["layerwise", "3", *["0.867 (0.700 to 1.000)"] * 3]
    assert rows(accuracy_table(read_results(folder, RUNS), "exact_match"))[3][3] == "0.433 (0.350 to 0.500)"


def test_cost_is_the_median_of_those_that_reached_it(folder):
    _, _, another, layerwise = rows(cost_table(read_results(folder, RUNS)))
    assert layerwise[2:] == ["1 of 3", "150 (2 of 3)", "4", "100", "10.0", "3", "2.5"]
    assert another[2:5] == ["0 of 1", "-", "4"]
    assert another[7] == "-"


def test_a_report_says_where_the_figures_come_from_and_what_was_cut_off(folder):
    text = origin(read_results(folder, RUNS))
    assert text == (
        "Device cpu; torch 2.0; transformers 5.0; commit abc; date 2026-01-01. 1 of 4 runs stopped at the time limit."
    )
    assert text in report(read_results(folder, RUNS))


def test_runs_come_in_the_order_of_the_study_and_others_are_left_out(folder):
    groups = read_results(
        folder, [short_run(name="another"), short_run(), short_run(seed=1), short_run(name="missing")]
    )
    assert [(name, len(records)) for (_, name), records in groups.items()] == [("another", 1), ("layerwise", 2)]


def test_numbers_of_segments_that_a_task_is_not_tested_on_stay_empty(folder):
    run = short_run(task={"name": "recall"}, test_segments=(1, 8))
    write(folder, run, record_of(run, 0.5))
    table = rows(accuracy_table(read_results(folder, RUNS), "token_accuracy"))
    assert table[0][3:] == ["1", "2", "4", "8"]
    assert next(row for row in table if row[0] == "recall")[3:] == ["0.500", "", "", "0.500"]


def test_the_plot_has_a_panel_for_each_task(folder):
    draw(read_results(folder, RUNS), folder / "one.png")
    run = short_run(task={"name": "recall"})
    write(folder, run, record_of(run, 0.5))
    draw(read_results(folder, RUNS), folder / "two.png")
    one, two = (matplotlib.image.imread(folder / f"{name}.png") for name in ("one", "two"))
    assert two.shape[1] > 1.5 * one.shape[1]
    assert one.std() > 0.01
