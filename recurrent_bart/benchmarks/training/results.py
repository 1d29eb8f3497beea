"""Results of the training benchmark: speed of runs on several processes, and cost of the training loop."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("runs", "loop")
MEASURED, LEFT_OUT = "measured", "not measured: the time limit is reached"


@dataclass(frozen=True)
class Launch:
    """Settings of one measurement, which starts `n_processes` processes on one host.

    `part` is one of `PARTS`. `sharding` is the path of the DeepSpeed configuration.
    """

    part: str
    n_processes: int
    sharding: Path

    def name(self) -> str:
        """Return the name of the launch for messages and files."""
        return f"{self.part}-{self.n_processes}-{self.sharding.stem}"


@dataclass
class Speed:
    """Metrics from the log of a run, with one value per log line after the warm-up.

    Attributes:
        outcome: "measured", or the reason why the launch was not measured.
        tokens_per_second: Document tokens per second of all processes.
        step_seconds: Seconds of a step.
        data_seconds: Part of `step_seconds` that is spent waiting for data.
        peak_bytes: Peak memory of the process with the most.
    """

    outcome: str = LEFT_OUT
    tokens_per_second: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], n_warmup: int, log_every: int) -> "Speed":
        """Build the metrics from log lines that start after `n_warmup` steps. Raise ValueError without any line."""
        lines = [it for it in records if "tokens_per_second" in it and it["step"] - log_every >= n_warmup]
        if not lines:
            raise ValueError(f"the log has no line after the {n_warmup} steps of --warmup; raise --steps")
        return cls(
            MEASURED,
            tokens_per_second=[line["tokens_per_second"] for line in lines],
            step_seconds=[line["step_seconds"] for line in lines],
            data_seconds=[line["data_seconds"] for line in lines],
            peak_bytes=max(line["memory_allocated_bytes"] for line in lines),
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics shown in the tables."""
        return {
            "tokens_per_second": statistics.median(self.tokens_per_second),
            "step_seconds": statistics.median(self.step_seconds),
            "spread": max(self.step_seconds) / min(self.step_seconds),
            "waiting": sum(self.data_seconds) / sum(self.step_seconds),
        }


@dataclass
class LoopCost:
    """Step times of the training loop and of bare steps, with one mean per round.

    Attributes:
        outcome: "measured", or the reason why the launch was not measured.
        trainer_seconds: Seconds of a step in the training loop, with metrics, logging and checks.
        bare_seconds: Seconds of a bare step: forward pass, backward pass and update, on the same engine and batches.
    """

    outcome: str = LEFT_OUT
    trainer_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return the metrics shown in the tables.

        `cost` is the fraction of time that the training loop adds to a bare step, as the median over rounds.
        """
        pairs = zip(self.trainer_seconds, self.bare_seconds, strict=True)
        costs = [trainer / bare - 1 for trainer, bare in pairs]
        return {
            "trainer_step_seconds": statistics.median(self.trainer_seconds),
            "bare_step_seconds": statistics.median(self.bare_seconds),
            "cost": statistics.median(costs),
            "least_cost": min(costs),
            "most_cost": max(costs),
        }


Results = dict[Launch, Speed | LoopCost]


def plan(parts: Sequence[str], processes: Sequence[int], shardings: Sequence[Path]) -> list[Launch]:
    """Return the launches in order.

    The largest number of processes comes first, because the time may end early. The smaller numbers follow in ascending
    order. The part "loop" has only the largest and the smallest number of processes.
    """
    numbers = sorted(set(processes))
    ends = sorted({numbers[0], numbers[-1]})
    n_processes = {"runs": [numbers[-1], *numbers[:-1]], "loop": ends[::-1]}
    return [Launch(part, number, it) for part in parts for number in n_processes[part] for it in shardings]


def empty_results(launches: Sequence[Launch]) -> Results:
    """Return an empty result for each launch."""
    return {launch: Speed() if launch.part == "runs" else LoopCost() for launch in launches}


def lines_of(results: Results) -> list[dict[str, Any]]:
    """Return one record per launch for a JSON file, with measurements and derived metrics."""
    return [
        {
            "part": launch.part,
            "processes": launch.n_processes,
            "sharding": launch.sharding.stem,
            "outcome": found.outcome,
            "figures": found.metrics() if found.outcome == MEASURED else None,
            "measured": {name: value for name, value in vars(found).items() if name != "outcome"},
        }
        for launch, found in results.items()
    ]
