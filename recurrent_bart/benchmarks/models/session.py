"""Loop that measures all cases of a suite alternately and saves the results after each measurement."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.benchmarks.models.cases import Case, Group
from recurrent_bart.benchmarks.models.measure import OUT_OF_MEMORY, Measurement, matrix_peak, measure
from recurrent_bart.files import atomic_write

Results = dict[str, dict[Case, Measurement]]


@dataclass(frozen=True)
class Effort:
    """Number of measurements and steps.

    Each case of a group is measured once in each of `n_rounds` rounds. A measurement has `n_warmup` untimed steps, then
    `n_passes` timed steps (0: measure only memory). No measurement starts after `budget_seconds`.
    """

    n_rounds: int
    n_warmup: int
    n_passes: int
    budget_seconds: float = float("inf")


def run_groups(
    groups: Sequence[Group], setting: BenchmarkSetting, effort: Effort, keep: Callable[[Results], None]
) -> Results:
    """Measure every case of every group. Call `keep` with all results after each measurement.

    Cases of a group alternate, so that a change of the device's speed affects all cases equally.
    """
    ends = time.monotonic() + effort.budget_seconds
    results: Results = {group.name: {case: Measurement() for case in group.cases} for group in groups}
    for group in groups:
        for _ in range(effort.n_rounds):
            peak = matrix_peak(setting.device, setting.dtype)
            for case, measurement in results[group.name].items():
                measurement.matrix_peak = max(measurement.matrix_peak, peak)
                if measurement.outcome == OUT_OF_MEMORY or time.monotonic() > ends:
                    continue
                measure(case, setting, measurement, effort.n_warmup, effort.n_passes)
                keep(results)
    return results


def write_results(path: Path, results: Results, about: dict[str, Any]) -> None:
    """Write a JSON file with one record per case: settings, measurements and derived metrics."""
    lines = [
        {"group": name, "label": case.label(), **asdict(case), **asdict(measured), **derived(measured)}
        for name, group in results.items()
        for case, measured in group.items()
    ]
    atomic_write(path, json.dumps(about | {"results": lines}, indent=1))


def derived(measured: Measurement) -> dict[str, float | None]:
    """Return the metrics derived from timed steps, by name. Without timed steps, all values are None."""
    names = "seconds", "spread", "tokens_per_second", "share_of_peak"
    is_timed = bool(measured.step_seconds)
    return {name: getattr(measured, name)() if is_timed else None for name in names}
