"""Report of a study on documents: Markdown tables and a plot."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from recurrent_bart.evaluation.bootstrap import Resamples, resample
from recurrent_bart.studies.report import Groups, Records, markdown, origin

# (document, index of the target in the document)
Target = tuple[str, int]
# target -> (total, count): the summed loss and the number of tokens, or the score of one text and 1
TargetScores = dict[Target, tuple[float, float]]
# model -> one entry per seed
Models = dict[str, list[TargetScores]]
Point = dict[str, Any]
MIB = 2**20
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
# a run finishes the step in which its time ends, so its seconds may exceed the limit by this factor
TOLERANCE = 1.02
# upper end of the first range of target positions, in tokens. Each next range ends at twice the previous end.
FIRST_PLACE = 512
# functions that format the fields of a point of the loss curve
FORMS = {
    "step": lambda value: f"{value:,.0f}",
    "seconds": lambda value: f"{value:,.0f}",
    "n_tokens": lambda value: f"{value / 1e6:,.1f}",
}
LEGEND = (
    "Brackets hold 95 % intervals over documents and seeds together. Each joins an interval over documents (bootstrap) "
    "and an interval over seeds (Student's t on the means of the seeds): the squared distances from the mean add up. "
    "The table of intervals shows the two intervals separately. With one seed, an interval is over documents alone and "
    "says nothing about a different seed. Differences are to the first model, paired by document and seed. Each model "
    "is compared at the evaluation with its lowest validation loss within the limit."
)


@dataclass(frozen=True)
class Comparison:
    """Metric of one model, and its difference to the metric of the first model (None for the first model itself)."""

    value: Resamples
    difference: Resamples | None


def text_report(groups: Groups) -> str:
    """Return a Markdown report: all tables and the origin of the records."""
    records = with_common_seeds({name: records for (_, name), records in groups.items()})
    seconds, step = equal_seconds(records), equal_step(records)
    in_time = {name: [_best(_until(r["curve"], "seconds", seconds)) for r in own] for name, own in records.items()}
    in_steps = {name: [_best(_until(r["curve"], "step", step)) for r in own] for name, own in records.items()}
    parts = [
        f"{next(iter(groups))[0]}. {LEGEND}",
        f"Validation loss per target token at equal time: {seconds:,.0f} s of training\n\n"
        + loss_table(records, in_time),
        f"Validation loss per target token at equal data: {step:,} steps on the same documents\n\n"
        + loss_table(records, in_steps),
        "Loss and difference at equal time, by position of the target: number of document tokens up to the end of "
        f"the target's section (number of targets)\n\n{position_table(records, in_time)}",
        f"ROUGE F-measure and difference of texts generated greedily at the end of training\n\n{rouge_table(records)}",
        "Intervals of the differences at equal time: over documents alone (bootstrap), over seeds alone (paired t)"
        f"\n\n{interval_table(records, in_time)}",
        f"Cost\n\n{cost_table(records)}",
        *foreign_state_section(records),
        origin(groups),
    ]
    return "\n\n".join(parts) + "\n"


def with_common_seeds(records: dict[str, Records]) -> dict[str, Records]:
    """Keep only the seeds that every model has. Return the records of each model, ordered by seed.

    Raises:
        ValueError: The models share no seed.
    """
    common = set.intersection(*({record["run"]["seed"] for record in own} for own in records.values()))
    if not common:
        raise ValueError("no seed has a finished run of every model, so the models cannot be compared")
    return {
        name: sorted(
            (record for record in own if record["run"]["seed"] in common), key=lambda record: record["run"]["seed"]
        )
        for name, own in records.items()
    }


def equal_seconds(records: dict[str, Records]) -> float:
    """Return the training seconds of the shortest run, which every other run has reached."""
    return min(record["curve"][-1]["seconds"] for own in records.values() for record in own)


def equal_step(records: dict[str, Records]) -> int:
    """Return the last step at which every run was evaluated, or 0 if no step is common."""
    steps = [{point["step"] for point in record["curve"]} for own in records.values() for record in own]
    return max(set.intersection(*steps), default=0)


def loss_table(records: dict[str, Records], points: dict[str, list[Point]]) -> str:
    """Return a table of loss, difference to the first model, steps, seconds and tokens of every model at `points`."""
    compared = compare(_losses(records, points))
    rows = []
    for name, own in points.items():
        if name not in compared:
            rows.append([name, str(len(own)), *[""] * 5])
            continue
        means = [form(statistics.mean(point[key] for point in own)) for key, form in FORMS.items()]
        comparison = compared[name]
        cells = _cell(comparison.value, ".3f"), _cell(comparison.difference, "+.3f")
        rows.append([name, str(len(own)), *means, *cells])
    return markdown(["model", "seeds", "steps", "seconds", "M tokens read", "loss", "difference"], rows)


def position_table(records: dict[str, Records], points: dict[str, list[Point]]) -> str:
    """Return a table of every model's loss and difference to the first model, by target position."""
    first = next(iter(records.values()))[0]
    places = {(t["document"], t["target"]): place(t["position"]) for t in first["targets"]}
    models = _losses(records, points)
    numbers = sorted({places[target] for target in _common(models)})
    columns = {}
    for number in numbers:
        part = {
            name: [{t: f for t, f in own.items() if places.get(t) == number} for own in seeds]
            for name, seeds in models.items()
        }
        columns[f"to {number:,} ({len(_common(part))})"] = compare(part)
    rows = [[name, *(_both(column.get(name), ".3f") for column in columns.values())] for name in models]
    return markdown(["model", *columns], rows)


def place(position: int) -> int:
    """Return the upper end, in tokens, of the position range that contains `position`."""
    found = FIRST_PLACE
    while found < position:
        found *= 2
    return found


def rouge_table(records: dict[str, Records]) -> str:
    """Return a table of every model's mean ROUGE scores and differences to the first model."""
    scores = {title: _scores(records, key) for key, title in ROUGE.items()}
    tables = {title: compare(models) for title, models in scores.items()}
    rows = [[name, *(_both(table.get(name), ".2f") for table in tables.values())] for name in records]
    n_texts = len(_common(scores["ROUGE-1"]))
    return markdown([f"model ({n_texts} texts)", *tables], rows)


def interval_table(records: dict[str, Records], points: dict[str, list[Point]]) -> str:
    """Return a table of differences to the first model, with intervals over documents and over seeds."""
    compared = {"loss": compare(_losses(records, points))}
    compared |= {title: compare(_scores(records, key)) for key, title in ROUGE.items()}
    rows = []
    for metric, models in compared.items():
        for name, comparison in models.items():
            if comparison.difference is not None:
                form = "+.3f" if metric == "loss" else "+.2f"
                parts = comparison.difference.over_documents(), comparison.difference.over_seeds()
                rows.append([name, metric, *(format(part, form) for part in parts)])
    return markdown(["model", "difference of", "over documents", "over seeds"], rows)


def cost_table(records: dict[str, Records]) -> str:
    """Return a table of every model's size, speed and memory. Speed and memory are medians over seeds."""
    rows = []
    for name, own in records.items():
        ends = [record["curve"][-1] for record in own]
        speed = statistics.median(end["step"] / end["seconds"] for end in ends)
        tokens = statistics.median(end["n_tokens"] / end["seconds"] for end in ends)
        peaks = [record["peak_bytes"] for record in own if record["peak_bytes"]]
        memory = f"{statistics.median(peaks) / MIB:,.0f}" if peaks else ""
        rows.append([name, f"{own[0]['n_parameters'] / 1e6:.1f}", f"{speed:.2f}", f"{tokens:,.0f}", memory])
    return markdown(["model", "M parameters", "steps/s", "tokens read/s", "peak MiB"], rows)


def foreign_state_section(records: dict[str, Records]) -> list[str]:
    """Return a section on the loss with the states of other documents, for models that carry a state."""
    rows = []
    for name, own in records.items():
        if not all(record.get("foreign_state_losses") for record in own):
            continue
        foreign = [_losses_at(r["targets"], {"target_losses": r["foreign_state_losses"]}) for r in own]
        # the first model of `compare` is the reference of the differences
        compared = compare({"own": [_losses_at(r["targets"], _best(r["curve"])) for r in own], "foreign": foreign})
        value = compared["foreign"]
        rows.append(
            [name, _cell(compared["own"].value, ".3f"), _cell(value.value, ".3f"), _cell(value.difference, "+.3f")]
        )
    if not rows:
        return []
    table = markdown(["model", "loss with its own states", "with foreign states", "difference"], rows)
    return [
        "Loss if every segment reads the state of a different document, which has read as many segments: the worth "
        f"of the state's content\n\n{table}"
    ]


def compare(models: Models) -> dict[str, Comparison]:
    """Compare each model with the first model, on the targets of all models. Models without values are left out."""
    reference, means = next(iter(models)), {}
    models = {name: own for name, own in models.items() if all(own)}
    targets = sorted(_common(models))
    if targets:
        means = {name: resample(*_by_document(own, targets)) for name, own in models.items()}
    return {
        name: Comparison(own, own - means[reference] if name != reference and reference in means else None)
        for name, own in means.items()
    }


def _common(models: Models) -> set[Target]:
    seeds = [set(scores) for own in models.values() if all(own) for scores in own]
    return set.intersection(*seeds) if seeds else set()


def _by_document(seeds: list[TargetScores], targets: list[Target]) -> tuple[np.ndarray, np.ndarray]:
    numbers = {document: number for number, document in enumerate(dict.fromkeys(name for name, _ in targets))}
    sums = np.zeros((2, len(seeds), len(numbers)))
    for seed, scores in enumerate(seeds):
        for target in targets:
            sums[:, seed, numbers[target[0]]] += scores[target]
    return sums[0], sums[1]


def _losses(records: dict[str, Records], points: dict[str, list[Point]]) -> Models:
    return {
        name: [_losses_at(record["targets"], point) for record, point in zip(own, points[name], strict=True)]
        for name, own in records.items()
    }


def _losses_at(targets: list[dict[str, Any]], point: Point) -> TargetScores:
    if not point:
        return {}
    losses = zip(point["target_losses"], (target["n_tokens"] for target in targets), strict=True)
    return _by_target(targets, losses)


def _scores(records: dict[str, Records], key: str) -> Models:
    return {name: [_scores_of(record.get("texts", []), key) for record in own] for name, own in records.items()}


def _scores_of(texts: list[dict[str, Any]], key: str) -> TargetScores:
    return _by_target(texts, ((text[key], 1.0) for text in texts))


def _by_target(rows: list[dict[str, Any]], scores: Iterable[tuple[float, float]]) -> TargetScores:
    """Return the metrics by target.

    Raises:
        ValueError: Two rows have the same document and target number.
    """
    found: TargetScores = {}
    for row, score in zip(rows, scores, strict=True):
        target = row["document"], row["target"]
        if target in found:
            raise ValueError(
                f"document {target[0]!r} has two targets with number {target[1]}: give each document a different id"
            )
        found[target] = score
    return found


def draw_losses(groups: Groups, path: Path) -> None:
    """Plot validation loss against training seconds and against steps, with one line per model and seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("seconds", "step"), ("seconds of training", "steps"), strict=True):
        for number, ((_, name), records) in enumerate(groups.items()):
            for seed, record in enumerate(records):
                points = [(point[key], point["validation_loss"]) for point in record["curve"]]
                label = None if seed else name
                axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", label=label, linewidth=1.2)
        axes.set_xlabel(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(next(iter(groups))[0], fontsize=10)
    panels[0].set_ylabel("validation loss per target token", fontsize=9)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _both(comparison: Comparison | None, form: str) -> str:
    if comparison is None:
        return ""
    return f"{_cell(comparison.value, form)} {_cell(comparison.difference, f'+{form}')}".strip()


def _cell(resamples: Resamples | None, form: str) -> str:
    return "" if resamples is None else format(resamples.interval(), form)


def _best(curve: list[Point]) -> Point:
    return min(curve, key=lambda point: point["validation_loss"], default={})


def _until(curve: Iterable[Point], key: str, limit: float) -> list[Point]:
    return [point for point in curve if point[key] <= limit * (TOLERANCE if key == "seconds" else 1)]
