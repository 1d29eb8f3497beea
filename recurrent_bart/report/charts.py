"""Charts of the report, for one run or for several runs drawn together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from recurrent_bart.report.drawing import (
    STEP,
    Points,
    Table,
    heat_map,
    legend,
    limits_of,
    lines,
    new_figure,
    stacked_bars,
    thousands,
)
from recurrent_bart.report.run_record import Run

Draw = Callable[[Sequence[Run]], Figure | None]
Series = list[tuple[str, Points, int, int]]
# Maximum number of columns of the rank heat map. With more log lines, each column is the mean of a group of lines.
MOST_COLUMNS = 60
STYLE_NAMES = ("solid", "dashed", "dotted")


@dataclass(frozen=True)
class Chart:
    """Chart of the report.

    `draw` returns None if no run has the data. The PNG file is named `name`. `caption` tells how to read the chart.
    """

    name: str
    heading: str
    caption: str
    draw: Draw


def series_of(runs: Sequence[Run], fields: dict[str, str]) -> Series:
    """Return one line per run and field. `fields` maps field names to labels.

    With several runs, the colour shows the run and the line style the field. With one run, the colour shows the field.
    """
    series: Series = []
    for number, run in enumerate(runs):
        drawn = [(place, name, run.points(name)) for place, name in enumerate(fields)]
        drawn = [entry for entry in drawn if entry[2]]
        for order, (place, name, points) in enumerate(drawn):
            if len(runs) > 1:
                series.append(("" if order else run.label, points, number, place))
            else:
                series.append((fields[name], points, place, place))
    return series


def _with_styles(text: str, runs: Sequence[Run], fields: dict[str, str]) -> str:
    """Return the title `text`. If colours show runs, the title also names the line style of each field."""
    if len(runs) == 1 or len(fields) == 1:
        return text
    return (
        f"{text}: {', '.join(f'{label} {style}' for label, style in zip(fields.values(), STYLE_NAMES, strict=False))}"
    )


def _loss(runs: Sequence[Run]) -> Figure | None:
    fields = {"loss": "training", "validation_loss": "validation"}
    series = series_of(runs, fields)
    if not series:
        return None
    figure, (axes,) = new_figure(3.2)
    lines(axes, series, _with_styles("cross-entropy per target token", runs, fields), starts_at_0=False)
    legend(figure)
    return figure


def _rouge(runs: Sequence[Run]) -> Figure | None:
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-Lsum"}
    found = [(label, series_of(runs, {name: ""})) for name, label in names.items()]
    if not any(series for _, series in found):
        return None
    figure, panels = new_figure(2.5, 1, 3)
    for axes, (label, series) in zip(panels, found, strict=True):
        lines(axes, series, f"{label}, F1, %")
    legend(figure)
    return figure


def _speed(runs: Sequence[Run]) -> Figure | None:
    speed, share = series_of(runs, {"tokens_per_second": ""}), series_of(runs, {"model_flops_share": ""})
    if not speed:
        return None
    figure, (left, right) = new_figure(2.7, 1, 2)
    lines(left, speed, "document tokens per second", numbers=thousands())
    lines(right, share, "share of the peak FLOP/s of all devices", numbers=PercentFormatter(1, decimals=0))
    legend(figure)
    return figure


KINDS = {
    "data_seconds": "waiting for data",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer update",
}


def _seconds(runs: Sequence[Run]) -> Figure | None:
    rows = {}
    for run in runs:
        if run.of("step_seconds"):
            parts = {label: fmean(run.of(name) or [0.0]) for name, label in KINDS.items()}
            rows[run.label] = parts | {"rest": max(0.0, fmean(run.of("step_seconds")) - sum(parts.values()))}
    if not rows:
        return None
    figure, (axes,) = new_figure(1.1 + 0.35 * len(rows))
    stacked_bars(axes, rows, "seconds per step by kind of work, mean over the run")
    legend(figure)
    return figure


def _processes(runs: Sequence[Run]) -> Figure | None:
    found = [(run, rank_table(run)) for run in runs if len(run.last("rank_seconds") or []) > 1]
    if not found:
        return None
    figure, panels = new_figure(sum(1.1 + 0.16 * max(6, len(table)) for _, (table, _) in found), len(found))
    for axes, (run, (table, steps)) in zip(panels, found, strict=True):
        text = f"{run.label}: seconds of a rank in data loading and forward passes, over the median rank"
        heat_map(axes, table, text, STEP, "rank", limits_of([table], from_0=False), steps)
        # Ranks count from 0.
        axes.set_yticks([place + 0.5 for place in range(len(table))], [str(place) for place in range(len(table))])
    return figure


def rank_table(run: Run) -> tuple[Table, list[int]]:
    """Return a table with a row per rank, in seconds over the median rank's seconds, and the step of each column."""
    newest = len(run.last("rank_seconds"))
    logged = [(r["step"], r["rank_seconds"]) for r in run.records if len(r.get("rank_seconds") or []) == newest]
    size = -(-len(logged) // MOST_COLUMNS)
    groups = [logged[start : start + size] for start in range(0, len(logged), size)]
    columns = []
    for group in groups:
        seconds = [fmean(values) for values in zip(*(values for _, values in group), strict=True)]
        middle = median(seconds) or 1.0
        columns.append([value / middle for value in seconds])
    return [list(row) for row in zip(*columns, strict=True)], [group[-1][0] for group in groups]


def _gates(runs: Sequence[Run]) -> Figure | None:
    names = {"prefix_gate": "gate on the prefix", "update_gate": "gate on the state update"}
    found = []
    for run in runs:
        for name, label in names.items():
            records = [record for record in run.records if record.get(name)]
            table = [list(row) for row in zip(*(record[name] for record in records), strict=True)]
            if table:
                found.append((name, _titled(runs, run, label), table, [record["step"] for record in records]))
    return _maps(found, STEP, is_by_name=True)


def _by_segment(name: str, highest: float | None = None) -> Draw:
    """Return a function that draws the last evaluation's table of layers by segments. `highest` caps the colours."""

    def draw(runs: Sequence[Run]) -> Figure | None:
        found = [(name, _titled(runs, run, f"after step {_step_of(run, name)}"), run.last(name), ()) for run in runs]
        return _maps([entry for entry in found if entry[2]], "segment", highest=highest)

    return draw


def _titled(runs: Sequence[Run], run: Run, label: str) -> str:
    return f"{run.label}, {label}" if len(runs) > 1 else label


def _step_of(run: Run, name: str) -> int:
    return max((record["step"] for record in run.records if record.get(name)), default=0)


def _maps(
    found: Sequence[tuple[str, str, Table, Sequence[object]]],
    x_label: str,
    highest: float | None = None,
    is_by_name: bool = False,
) -> Figure | None:
    """Draw heat maps in a grid. All have one colour scale, or one per field with `is_by_name`."""
    if not found:
        return None
    n_columns = 2 if len(found) > 1 and all(len(table[0]) <= 10 for _, _, table, _ in found) else 1
    n_rows = -(-len(found) // n_columns)
    tallest = max(len(table) for _, _, table, _ in found)
    figure, panels = new_figure(n_rows * (0.85 + 0.26 * max(2, tallest)), n_rows, n_columns)
    for axes, (name, text, table, columns) in zip(panels, found, strict=False):
        kind = [other for other_name, _, other, _ in found if other_name == name or not is_by_name]
        heat_map(axes, table, text, x_label, "layer", (0.0, highest or limits_of(kind)[1]), columns)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    return figure


def _gradient(runs: Sequence[Run]) -> Figure | None:
    series = []
    for number, run in enumerate(runs):
        records = [record for record in run.records if record.get("gradient_by_distance")]
        shown = (
            [(records[0], 1), (records[-1], 0)]
            if len(runs) == 1 and len(records) > 1
            else [(r, 0) for r in records[-1:]]
        )
        for record, style in shown:
            points = [(float(n), y) for n, y in enumerate(record["gradient_by_distance"]) if y > 0]
            label = run.label if len(runs) > 1 else f"after step {record['step']}"
            if points:
                series.append((label, points, number if len(runs) > 1 else style, style))
    if not series:
        return None
    figure, (axes,) = new_figure(2.7)
    lines(
        axes,
        series,
        "gradient norm of the last target's loss at the embeddings of a segment",
        "distance in segments",
        is_log=True,
    )
    legend(figure)
    return figure


CHARTS = {
    "Learning": (
        Chart(
            "loss",
            "Loss",
            "Both losses should fall. Overfitting: the validation loss rises while the training loss still falls.",
            _loss,
        ),
        Chart(
            "rouge",
            "ROUGE",
            "Overlap of words and word pairs between generated texts and targets, on validation documents.",
            _rouge,
        ),
    ),
    "Speed": (
        Chart(
            "speed",
            "Throughput",
            "The share of the peak counts useful operations only, not operations that gradient checkpointing repeats.",
            _speed,
        ),
        Chart(
            "seconds",
            "Time per step",
            "Waiting for data should be close to 0. Backward includes waiting for gradients of other ranks.",
            _seconds,
        ),
        Chart(
            "processes",
            "Ranks",
            "The median rank has 1.00; a slower rank has more. A rank that is always slow points to a slow device, "
            "and neighbouring slow ranks point to a slow node.",
            _processes,
        ),
    ),
    "Recurrence": (
        Chart(
            "gates",
            "Gates",
            "Opening of each layer's gates at each evaluation. The gate on the prefix starts at 0: the model then "
            "equals BART. A layer whose gate stays at 0 reads nothing from the state.",
            _gates,
        ),
        Chart(
            "prefix_size",
            "Read from the state",
            "Norm of the attention output from the prefix over the norm of the attention output from tokens, in two "
            "validation documents. 0: tokens read nothing from the state; 1: as much as from the text.",
            _by_segment("prefix_size"),
        ),
        Chart(
            "prefix_mass",
            "Attention to the prefix",
            "Share of the tokens' attention. With gated prefix_attention: opening of the gate, equal in all segments.",
            _by_segment("prefix_mass"),
        ),
        Chart(
            "state_norm",
            "Size of the state",
            "The size should become constant. If the size grows with every segment, long documents have no bound.",
            _by_segment("state_norm"),
        ),
        Chart(
            "state_change",
            "Change of the state",
            "Change by each segment, over the size before the segment. 0: the segment is not stored in the state.",
            _by_segment("state_change", highest=1.0),
        ),
        Chart(
            "gradient",
            "Gradient by distance",
            "A gentle slope: targets train the model to remember distant segments. With closed gates, the gradient "
            "does not reach segments before the last.",
            _gradient,
        ),
    ),
}
