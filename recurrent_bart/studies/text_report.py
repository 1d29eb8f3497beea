"""What the runs of a study on documents show together: a table in Markdown and a plot."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recurrent_bart.studies.report import Groups, markdown, mean_and_range, origin

Curve = list[dict[str, float]]


def text_report(groups: Groups) -> str:
    """The table, and where it comes from."""
    return (
        "Validation loss per target token and ROUGE F-measure: mean (lowest to highest seed). Equal time is the "
        f"training time of the fastest model.\n\n{loss_table(groups)}\n\n{origin(groups)}\n"
    )


def loss_table(groups: Groups) -> str:
    """Lowest validation loss at equal steps and at equal time, ROUGE at the former, and the time of all steps."""
    head = ["documents", "model", "seeds", "steps", "seconds", "loss", "loss at equal time", "ROUGE-1", "-2", "-L"]
    rows = []
    for (task, name), records in groups.items():
        curves: list[Curve] = [record["curve"] for record in records]
        equal_seconds = min(_seconds(other) for (of_task, _), other in groups.items() if of_task == task)
        ends, best = [curve[-1] for curve in curves], [_best(curve) for curve in curves]
        cells = [
            _cell(ends, "step", ",.0f"),
            _cell(ends, "seconds", ",.0f"),
            _cell(best, "validation_loss", ".3f"),
            _cell([_best(_until(curve, equal_seconds)) for curve in curves], "validation_loss", ".3f"),
            *(_cell(best, name, ".1f") for name in ("rouge1", "rouge2", "rougeL")),
        ]
        rows.append([task, name, str(len(records)), *cells])
    return markdown(head, rows)


def draw_losses(groups: Groups, path: Path) -> None:
    """Validation loss against seconds of training, a panel for the documents, a line for each seed."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, ((_, name), records) in enumerate(groups.items()):
        for seed, record in enumerate(records):
            points = [(point["seconds"], point["validation_loss"]) for point in record["curve"]]
            label = None if seed else name
            axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=label, linewidth=1.2)
    axes.set_title(next(iter(groups))[0], fontsize=10)
    axes.set_xlabel("seconds of training", fontsize=9)
    axes.set_ylabel("validation loss per target token", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _cell(points: Curve, name: str, form: str) -> str:
    return mean_and_range([point[name] for point in points if name in point], form)


def _best(curve: Curve) -> dict[str, float]:
    return min(curve, key=lambda point: point["validation_loss"])


def _until(curve: Curve, seconds: float) -> Curve:
    return [point for point in curve if point["seconds"] <= seconds]


def _seconds(records: list[dict[str, Any]]) -> float:
    return max(record["curve"][-1]["seconds"] for record in records)
