"""Table and file of the generation benchmark."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from recurrent_bart.benchmarks.generation.cases import LOOPS, GenerationCase
from recurrent_bart.benchmarks.generation.measure import GenerationMeasurement, Results
from recurrent_bart.files import atomic_write

COLUMNS = ("beams", "context", "documents", "ms a token", "tokens/s", "of limit", "speed-up", "MiB", "equal ids")
LEGEND = (
    "ms a token: median time of a call, divided by the length of the texts; tokens/s: tokens of the returned texts; "
    "of limit: share of the speed at which weights and caches can be read once a step; speed-up: beside Hugging "
    "Face's eager loop; MiB: peak memory of a call; equal ids: share of the ids that the eager loop writes too. "
    "Beam search has no_repeat_ngram_size 3."
)


def derived(results: Results, case: GenerationCase) -> dict[str, float | None]:
    """Return the metrics derived from timed calls; None without timed calls."""
    names = "seconds", "tokens_per_second", "ms_per_token", "share_of_limit", "speed_up"
    measured = results[case]
    if not measured.call_seconds:
        return dict.fromkeys(names)
    seconds = measured.seconds()
    eager = [other.seconds() for there, other in results.items() if _is_eager_twin(there, case) and other.call_seconds]
    values = (
        seconds,
        case.batch_size * case.new_tokens / seconds,
        1000 * seconds / case.new_tokens,
        measured.limit_seconds / seconds,
        eager[0] / seconds if eager else None,
    )
    return dict(zip(names, values, strict=True))


def _is_eager_twin(there: GenerationCase, case: GenerationCase) -> bool:
    return there.loop == "eager" and there.group() == case.group()


def write_results(path: Path, results: Results, about: dict[str, Any]) -> None:
    """Write a JSON file with one record per case: settings, measurements and derived metrics."""
    records = [
        {"label": LOOPS[case.loop], **asdict(case), **asdict(measured), **derived(results, case)}
        for case, measured in results.items()
    ]
    atomic_write(path, json.dumps(about | {"results": records}, indent=1))


def table(results: Results) -> Table:
    """Return a table with one row per case."""
    found = Table(title="generation", title_justify="left")
    found.add_column("loop", min_width=20)
    for column in COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    for case, measured in results.items():
        sizes = str(case.num_beams), f"{case.n_context:,}", str(case.batch_size)
        found.add_row(LOOPS[case.loop], *sizes, *_cells(measured, derived(results, case)))
    return found


def _cells(measured: GenerationMeasurement, metrics: dict[str, float | None]) -> list[str]:
    if measured.outcome != "measured" or metrics["seconds"] is None:
        return [measured.outcome]
    speed_up = "" if metrics["speed_up"] is None else f"{metrics['speed_up']:.2f} x"
    return [
        f"{metrics['ms_per_token']:,.2f}",
        f"{metrics['tokens_per_second']:,.0f}",
        f"{100 * (metrics['share_of_limit'] or 0):.0f} %",
        speed_up,
        f"{measured.call_bytes / 2**20:,.0f}",
        f"{100 * (measured.equal_ids or 0):.1f} %",
    ]
