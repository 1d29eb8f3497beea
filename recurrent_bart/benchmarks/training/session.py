"""Starter that runs planned launches one after the other and stores each result, or the reason of a failure."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recurrent_bart.benchmarks.training.launched_processes import run_process
from recurrent_bart.benchmarks.training.results import Launch, LoopCost, Results, Speed
from recurrent_bart.benchmarks.training.workloads import Work
from recurrent_bart.run_folder import RunFolder


@dataclass(frozen=True)
class Starter:
    """Starter that runs the processes of each launch and reads their results.

    Attributes:
        work: Settings of the training that is measured.
        place: Folder for documents and temporary files.
        logs: Folder for the output of the processes.
        command: Function that builds the command of a launch from `launch/train.py` flags and the result file of the
            part "loop".
        timeout_seconds: Seconds after which a launch counts as failed.
    """

    work: Work
    place: Path
    logs: Path
    command: Callable[[Launch, Sequence[str], Path], Sequence[str]]
    timeout_seconds: float

    def fill(self, results: Results, ends: float, keep: Callable[[Launch], None]) -> None:
        """Run all launches in order. Put each result into `results`, and call `keep` after each launch.

        No launch starts after `ends`, a time on the clock of `time.monotonic`.
        """
        self.work.documents(max(launch.n_processes for launch in results)).write(self.place)
        for launch in results:
            if time.monotonic() < ends:
                self.measure(launch, results)
            keep(launch)

    def measure(self, launch: Launch, results: Results) -> None:
        """Run one launch. If the launch fails, store the reason, so that later launches still run."""
        try:
            command = self.command(launch, self.work.flags(launch, self.place), self.file_of(launch))
            run_process(command, self.logs / f"{launch.name()}.log", self.timeout_seconds)
            results[launch] = self.read(launch)
        except (RuntimeError, ValueError, OSError) as error:
            results[launch].outcome = f"failed, {error}"
        # checkpoints of large models would fill the disk
        shutil.rmtree(self.place / launch.name(), ignore_errors=True)

    def read(self, launch: Launch) -> Speed | LoopCost:
        """Read the result of a launch. Raise ValueError if the result is malformed, OSError if a file is missing."""
        if launch.part == "loop":
            return LoopCost(**json.loads(self.file_of(launch).read_text()))
        records = RunFolder(self.place / launch.name()).read_metrics()
        return Speed.of(records, self.work.warmup, self.work.arguments(launch.part).run.log_every)

    def file_of(self, launch: Launch) -> Path:
        """Return the file to which a launch of the part "loop" writes its result."""
        return self.place / f"{launch.name()}.json"
