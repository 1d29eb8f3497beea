"""Report of a study on memory tasks: Markdown tables and a plot."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recurrent_bart.studies.study_run import Run, RunFile

MIB = 2**20
MEASURES = {"token_accuracy": "share of correct tokens", "exact_match": "share of answers with all tokens correct"}

Records = list[dict[str, Any]]
# (task, variant) -> one record per seed
Groups = dict[tuple[str, str], Records]


def read_results(folder: Path, runs: Iterable[Run]) -> Groups:
    """Return the JSON records of all finished runs by task and variant, in the order of `runs`."""
    groups: Groups = {}
    for run in runs:
        file = RunFile(folder / run.file_name())
        record = file.read() if file.path.exists() else {}
        if "stopped" in record:
            groups.setdefault((run.task_name(), run.name), []).append(record)
    return groups


def report(groups: Groups) -> str:
    """Return a Markdown report with tables of accuracy and cost, and a line with devices, versions and dates."""
    tables = [
        f"Test accuracy by number of segments, {text}: mean (lowest to highest seed)\n\n" for text in MEASURES.values()
    ]
    parts = [title + accuracy_table(groups, name) for title, name in zip(tables, MEASURES, strict=True)]
    parts.append("Cost; several runs may share a device\n\n" + cost_table(groups))
    parts.append(origin(groups))
    return "\n\n".join(parts) + "\n"


def accuracy_table(groups: Groups, measure: str) -> str:
    """Return a table of the mean and range over seeds of the metric `measure`, by number of segments."""
    numbers = sorted({int(n) for records in groups.values() for record in records for n in record["accuracy"]})
    rows = []
    for (task, name), records in groups.items():
        values = [[r["accuracy"][str(n)][measure] for r in records if str(n) in r["accuracy"]] for n in numbers]
        rows.append([task, name, str(len(records)), *map(mean_and_range, values)])
    return markdown(["task", "model", "seeds", *map(str, numbers)], rows)


def cost_table(groups: Groups) -> str:
    """Return a table of steps and seconds until a task is learnt, speed and memory. Values are medians over seeds."""
    head = ["task", "model", "learnt", "steps to 0.9", "seconds to 0.9", "steps", "steps/s", "peak MiB", "M parameters"]
    rows = []
    for (task, name), records in groups.items():
        n_learnt = sum(record["stopped"] == "learnt" for record in records)
        rows.append(
            [
                task,
                name,
                f"{n_learnt} of {len(records)}",
                _to_reach(records, "steps_to_reach"),
                _to_reach(records, "seconds_to_reach"),
                _median(records, lambda record: record["steps"]),
                _median(records, lambda record: record["steps"] / record["seconds"], ".1f"),
                _median(records, lambda record: record["peak_bytes"] and record["peak_bytes"] / MIB),
                _median(records, lambda record: record["n_parameters"] / 1e6, ".1f"),
            ]
        )
    return markdown(head, rows)


def origin(groups: Groups) -> str:
    """Return a text with the devices, versions, commits and dates of all runs, and the number of runs without time."""
    records = [record for group in groups.values() for record in group]
    facts = {
        "Device": {record["device"] for record in records},
        "torch": {record["versions"]["torch"] for record in records},
        "transformers": {record["versions"]["transformers"] for record in records},
        "commit": {str(record["git_commit"]) for record in records},
        "date": {record["date"] for record in records},
    }
    cut = sum(record["stopped"] == "budget" for record in records)
    ended = f" {cut} of {len(records)} runs stopped at the time limit." if cut else ""
    return "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in facts.items()) + f".{ended}"


def draw(groups: Groups, path: Path, measure: str = "token_accuracy") -> None:
    """Plot the metric `measure` against the number of segments, with one panel per task and a band for the seeds."""
    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure = Figure(figsize=(5.5 * len(tasks) + 2.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        members = {name: records for (of_task, name), records in groups.items() if of_task == task}
        _draw_task(axes, members, measure)
        axes.set_title(task, fontsize=10)
    panels[0].set_ylabel(MEASURES[measure], fontsize=9)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _draw_task(axes: Axes, members: dict[str, Records], measure: str) -> None:
    for number, (name, records) in enumerate(members.items()):
        numbers = sorted({int(n) for record in records for n in record["accuracy"]})
        values = [[r["accuracy"][str(n)][measure] for r in records if str(n) in r["accuracy"]] for n in numbers]
        color = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        axes.plot(
            numbers, [statistics.mean(v) for v in values], style, color=color, label=name, marker="o", markersize=3
        )
        axes.fill_between(numbers, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
        trained = records[0]["run"]["stages"][-1]
        # The model was never trained on documents with more segments than at this line.
        axes.axvline(trained, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("segments", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def mean_and_range(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean as text, followed by lowest and highest value if they differ. Return "" without values."""
    if not values:
        return ""
    lowest, highest, mean = (format(value, form) for value in (min(values), max(values), statistics.mean(values)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _to_reach(records: Records, name: str) -> str:
    reached = [record[name] for record in records if record[name] is not None]
    if not reached:
        return "-"
    some = "" if len(reached) == len(records) else f" ({len(reached)} of {len(records)})"
    return f"{statistics.median(reached):,.0f}{some}"


def _median(records: Records, value: Callable[[dict[str, Any]], float | None], form: str = ",.0f") -> str:
    values = [number for number in map(value, records) if number is not None]
    return format(statistics.median(values), form) if values else "-"
