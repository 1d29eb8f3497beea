"""A picture of how a run went."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# panel: its unit, and the series drawn in it as (field, label)
PANELS = {
    "cross-entropy per target token": [("loss", "training"), ("validation_loss", "validation")],
    "ROUGE F, %": [("rouge1", "1"), ("rouge2", "2"), ("rougeL", "L")],
    "learning rate": [("learning_rate", "")],
    "document tokens per second": [("tokens_per_second", "")],
}


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the records of `metrics.jsonl` against their step as a PNG."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, label in series:
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "", linewidth=1.5
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        # a quantity that never falls below 0 is shown from there
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
