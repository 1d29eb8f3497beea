"""All cases of a suite in turns, with what was found on disk after each."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recurrent_bart.benchmarks.models.cases import Case, Group
from recurrent_bart.benchmarks.models.measure import OUT_OF_MEMORY, Measurement, matrix_peak, measure
from recurrent_bart.benchmarks.models.subjects import Place

Results = dict[str, dict[Case, Measurement]]


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        n_rounds: Turns of each case beside the others of its group.
        n_warmup: Steps of a turn before anything is measured.
        n_passes: Timed steps of a turn; 0: memory alone.
        budget_seconds: Nothing is begun after so long.
    """

    n_rounds: int
    n_warmup: int
    n_passes: int
    budget_seconds: float = float("inf")


def run_groups(groups: Sequence[Group], place: Place, effort: Effort, keep: Callable[[Results], None]) -> Results:
    """Measure every case of every group, those of a group in turns, so that what a device drifts by meets all alike.

    Args:
        groups: What is compared.
        place: Where, and how large.
        effort: How long.
        keep: Called with all there is after each turn.
    """
    ends = time.monotonic() + effort.budget_seconds
    results: Results = {group.name: {case: Measurement() for case in group.cases} for group in groups}
    for group in groups:
        for _ in range(effort.n_rounds):
            peak = matrix_peak(place.device, place.dtype)
            for case, measurement in results[group.name].items():
                measurement.matrix_peak = max(measurement.matrix_peak, peak)
                if measurement.outcome == OUT_OF_MEMORY or time.monotonic() > ends:
                    continue
                measure(case, place, measurement, effort.n_warmup, effort.n_passes)
                keep(results)
    return results


def write_results(path: Path, results: Results, about: dict[str, Any]) -> None:
    """Write all there is as JSON: a line for each case, with what follows from what was measured."""
    lines = [
        {"group": name, "label": case.label(), **asdict(case), **asdict(measured), **derived(measured)}
        for name, group in results.items()
        for case, measured in group.items()
    ]
    part = path.with_suffix(".part")
    part.write_text(json.dumps(about | {"results": lines}, indent=1))
    os.replace(part, path)


def derived(measured: Measurement) -> dict[str, float | None]:
    """Figures that readers want; None where there is nothing to divide by."""
    names = "seconds", "spread", "tokens_per_second", "share_of_peak"
    is_timed = bool(measured.step_seconds)
    return {name: getattr(measured, name)() if is_timed else None for name in names}
