"""Charts draw the values of the log, each in its line."""

import pytest

from recurrent_bart.report.charts import CHARTS
from recurrent_bart.report.run_record import Run
from reported_runs import evaluation_record, step_record

DRAW = {chart.name: chart.draw for charts in CHARTS.values() for chart in charts}


def lines_of(figure):
    """Return the points of each drawn line of a figure, without guide lines."""
    lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    return [points for points in lines if len(points) > 1]


def make_run(name, factor=1.0):
    """Return a run of two evaluations, whose gradient falls by another factor in the second one."""
    gradients = [[1.0, 0.5, 0.25], [1.0, 0.1 * factor, 0.01 * factor]]
    records = [evaluation_record(step, gradient_by_distance=row) for step, row in zip((10, 20), gradients, strict=True)]
    return Run(name, {}, [step_record(10, loss=3.0 * factor), step_record(20, loss=2.0 * factor), *records])


def points_of(values):
    return [pytest.approx([distance, value]) for distance, value in enumerate(values)]


def test_the_gradient_of_one_run_is_that_of_its_first_and_last_evaluation():
    first, last = points_of([1.0, 0.5, 0.25]), points_of([1.0, 0.1, 0.01])
    assert lines_of(DRAW["gradient"]([make_run("a")])) == [first, last]


def test_the_gradients_of_several_runs_are_those_of_their_last_evaluations():
    found = lines_of(DRAW["gradient"]([make_run("a"), make_run("b", factor=2.0)]))
    assert found == [points_of([1.0, 0.1, 0.01]), points_of([1.0, 0.2, 0.02])]


def test_losses_are_drawn_against_their_steps():
    found = lines_of(DRAW["loss"]([make_run("a")]))
    assert [[10.0, 3.0], [20.0, 2.0]] in found


@pytest.mark.parametrize(("name", "starts_at_0"), [("loss", False), ("rouge", True), ("speed", True)])
def test_only_the_axis_of_a_loss_begins_above_0(name, starts_at_0):
    figure = DRAW[name]([make_run("a")])
    for axes in figure.axes:
        lowest = min(y for line in axes.lines for _, y in line.get_xydata())
        start = axes.get_ylim()[0]
        assert start == 0 if starts_at_0 else 0 < start < lowest, axes.get_title()


def test_the_gradient_has_a_logarithmic_axis():
    (axes,) = DRAW["gradient"]([make_run("a")]).axes
    assert axes.get_yscale() == "log"
