"""The plot contains the logged values."""

import matplotlib.image
import pytest

from recurrent_bart.report import curves as module
from recurrent_bart.report.curves import draw_curves

RECORDS = [
    {"step": 0, "validation_loss": 9.0},
    {"step": 10, "loss": 8.0, "learning_rate": 3e-4, "tokens_per_second": 17_500.0},
    {"step": 20, "loss": None, "learning_rate": 1e-4, "tokens_per_second": 16_000.0},
    {"step": 20, "validation_loss": 7.0, "rouge1": 20.0, "rouge2": 5.0, "rougeL": 15.0, "rougeLsum": 16.0},
]


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Return the Matplotlib figure."""
    figures = []
    make = module.Figure
    monkeypatch.setattr(module, "Figure", lambda *args, **kwargs: figures.append(make(*args, **kwargs)) or figures[0])
    draw_curves(RECORDS, tmp_path / "curves.png")
    return figures[0]


def test_every_series_is_drawn_against_its_steps(figure):
    drawn = {
        axes.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figure.axes
    }
    loss, rouge, rate, speed = drawn.values()
    # A non-finite loss is a gap.
    assert loss == {"training": [(10, 8.0)], "validation": [(0, 9.0), (20, 7.0)]}
    assert {label: points[0][1] for label, points in rouge.items()} == {
        "ROUGE-1": 20.0,
        "ROUGE-2": 5.0,
        "ROUGE-L": 15.0,
        "ROUGE-Lsum": 16.0,
    }
    assert [*rate.values()] == [[(10, 3e-4), (20, 1e-4)]]
    assert [*speed.values()] == [[(10, 17_500.0), (20, 16_000.0)]]


@pytest.mark.slow
def test_steps_are_whole_numbers_and_all_axes_share_them(figure):
    for axes in figure.axes:
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        assert all(tick == int(tick) for tick in axes.get_xticks())


def test_only_the_axis_of_the_loss_begins_above_0(figure):
    starts = [axes.get_ylim()[0] for axes in figure.axes]
    assert 0 < starts[0] < 7.0
    assert starts[1:] == [0.0, 0.0, 0.0]


def test_throughput_is_shown_in_thousands(figure):
    assert figure.axes[3].yaxis.get_major_formatter()(17_500.0) == "17.5 k"


@pytest.mark.slow
@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS])
def test_every_log_can_be_drawn(records, tmp_path):
    draw_curves(records, tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[:2] == (780, 1200)
