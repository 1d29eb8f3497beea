"""What was found of training: the speed of runs on several processes, and what their loop costs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("runs", "loop")
MEASURED, LEFT_OUT = "measured", "left out: the time was over"


@dataclass(frozen=True)
class Launch:
    """One start of several processes.

    Attributes:
        part: One of `PARTS`: the steps of a run, or their loop beside bare steps.
        n_processes: All of one machine.
        sharding: DeepSpeed configuration.
    """

    part: str
    n_processes: int
    sharding: Path

    def name(self) -> str:
        """In messages, and of its files."""
        return f"{self.part}-{self.n_processes}-{self.sharding.stem}"


@dataclass
class Speed:
    """What a run's log says, a number for each line of it after the warm-up.

    Attributes:
        outcome: "measured", or why it was not.
        tokens_per_second: Document tokens, of all processes.
        step_seconds: Of a step, all in all.
        data_seconds: Of a step, waiting for data.
        peak_bytes: Most memory, of the process with the most.
    """

    outcome: str = LEFT_OUT
    tokens_per_second: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], n_warmup: int, log_every: int) -> "Speed":
        """Read `metrics.jsonl`.

        Args:
            records: Its lines.
            n_warmup: Steps that are left out; of the lines of the log, those that begin after them are read.
            log_every: Steps of a line.

        Raises:
            ValueError: There is none.
        """
        lines = [it for it in records if "tokens_per_second" in it and it["step"] - log_every >= n_warmup]
        if not lines:
            raise ValueError(f"nothing was logged of the steps after the first {n_warmup}")
        return cls(
            MEASURED,
            tokens_per_second=[line["tokens_per_second"] for line in lines],
            step_seconds=[line["step_seconds"] for line in lines],
            data_seconds=[line["data_seconds"] for line in lines],
            peak_bytes=max(line["memory_allocated_bytes"] for line in lines),
        )

    def figures(self) -> dict[str, float]:
        """What readers want."""
        return {
            "tokens_per_second": statistics.median(self.tokens_per_second),
            "step_seconds": statistics.median(self.step_seconds),
            "spread": max(self.step_seconds) / min(self.step_seconds),
            "waiting": sum(self.data_seconds) / sum(self.step_seconds),
        }


@dataclass
class LoopCost:
    """Seconds of a step, a mean over some steps for each turn; turns of both by their round.

    Attributes:
        outcome: "measured", or why it was not.
        trainer_seconds: In the loop of training, with all that it counts, logs and asks for.
        bare_seconds: Forward pass, backward pass and update alone, on the same engine and batches.
    """

    outcome: str = LEFT_OUT
    trainer_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """What readers want: what the loop adds to a bare step, as a share of it, by rounds."""
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
    """What is started, in order: the most processes first, then one and more, for time may run out.

    The loop is measured on the fewest and on the most processes.
    """
    numbers = sorted(set(processes))
    ends = sorted({numbers[0], numbers[-1]})
    wanted = {"runs": [numbers[-1], *numbers[:-1]], "loop": ends[::-1]}
    return [Launch(part, number, it) for part in parts for number in wanted[part] for it in shardings]


def empty_results(launches: Sequence[Launch]) -> Results:
    """What is known before anything is measured."""
    return {launch: Speed() if launch.part == "runs" else LoopCost() for launch in launches}


def lines_of(results: Results) -> list[dict[str, Any]]:
    """All that is known, a line for each start, with what follows from what was measured."""
    return [
        {
            "part": launch.part,
            "processes": launch.n_processes,
            "sharding": launch.sharding.stem,
            "outcome": found.outcome,
            "figures": found.figures() if found.outcome == MEASURED else None,
            "measured": {name: value for name, value in vars(found).items() if name != "outcome"},
        }
        for launch, found in results.items()
    ]
