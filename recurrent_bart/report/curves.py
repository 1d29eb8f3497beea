"""Plot of a run's metrics against the step, as one PNG file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, ScalarFormatter

# A curve with fewer points than this has a marker at each point.
FEW = 40


@dataclass(frozen=True)
class Panel:
    """One chart. `series` maps fields to labels. `starts_at_0` suits metrics near 0, but not a loss."""

    title: str
    series: dict[str, str]
    starts_at_0: bool = True
    numbers: Formatter = field(default_factory=ScalarFormatter)


def _power_of_10() -> Formatter:
    numbers = ScalarFormatter(useMathText=True)
    numbers.set_powerlimits((-1, 4))
    return numbers


def _panels() -> tuple[Panel, ...]:
    """Build new panels for each figure, because a formatter belongs to one axis."""
    return (
        Panel(
            "cross-entropy per target token", {"loss": "training", "validation_loss": "validation"}, starts_at_0=False
        ),
        Panel(
            "ROUGE F1, %, validation",
            {"rouge1": "ROUGE-1", "rougeLsum": "ROUGE-Lsum", "rougeL": "ROUGE-L", "rouge2": "ROUGE-2"},
        ),
        Panel("learning rate", {"learning_rate": ""}, numbers=_power_of_10()),
        # Example: 17.5 k.
        Panel("document tokens per second", {"tokens_per_second": ""}, numbers=EngFormatter(sep=" ")),
    )


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Plot `records`, the lines of `metrics.jsonl`, against the step and write the plot as a PNG file."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    last_step = max([record["step"] for record in records], default=0)
    for axes, panel in zip(figure.subplots(2, 2, sharex=True).flat, _panels(), strict=True):
        _draw(axes, panel, records)
        axes.set_xlim(0, max(last_step, 1) * 1.02)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=120, format="png")


def _draw(axes: Axes, panel: Panel, records: list[dict[str, Any]]) -> None:
    # A dashed line keeps both curves visible if they coincide, as two ROUGE metrics often do.
    styles = ("-", "-", "--", "-")
    for (name, label), style in zip(panel.series.items(), styles, strict=False):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            marker = "o" if len(points) < FEW else ""
            axes.plot(*zip(*points, strict=True), style, label=label, marker=marker, markersize=3, linewidth=1.5)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(panel.numbers)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    if panel.starts_at_0:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
