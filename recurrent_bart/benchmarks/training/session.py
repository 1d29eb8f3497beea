"""All starts of a comparison of training, one after the other, each with what it found or why it failed."""

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
    """Starts processes and reads what they leave.

    Attributes:
        work: What is trained.
        place: Folder of the documents and of all that is thrown away.
        logs: Folder of what is printed.
        command: Makes the command of a start from the flags of `launch/train.py` and the file for what a loop costs.
        timeout_seconds: What takes longer has failed.
    """

    work: Work
    place: Path
    logs: Path
    command: Callable[[Launch, Sequence[str], Path], Sequence[str]]
    timeout_seconds: float

    def fill(self, results: Results, ends: float, keep: Callable[[Launch], None]) -> None:
        """Replace the empty results of all starts in their order.

        Args:
            results: By start.
            ends: Nothing is begun after this time, as `time.monotonic` has it.
            keep: Called with each start when its turn is over.
        """
        self.work.documents(max(launch.n_processes for launch in results)).write(self.place)
        for launch in results:
            if time.monotonic() < ends:
                self.measure(launch, results)
            keep(launch)

    def measure(self, launch: Launch, results: Results) -> None:
        """Start one; whatever becomes of it, the others are not touched."""
        try:
            command = self.command(launch, self.work.flags(launch, self.place), self.file_of(launch))
            run_process(command, self.logs / f"{launch.name()}.log", self.timeout_seconds)
            results[launch] = self.read(launch)
        except (RuntimeError, ValueError, OSError) as error:
            results[launch].outcome = f"failed, {error}"
        # a large model's checkpoints would fill the disk, one start after the other
        shutil.rmtree(self.place / launch.name(), ignore_errors=True)

    def read(self, launch: Launch) -> Speed | LoopCost:
        """What a start left.

        Raises:
            ValueError: It is not what was to be left.
            OSError: It cannot be read.
        """
        if launch.part == "loop":
            return LoopCost(**json.loads(self.file_of(launch).read_text()))
        records = RunFolder(self.place / launch.name()).read_metrics()
        return Speed.of(records, self.work.warmup, self.work.arguments(launch.part).run.log_every)

    def file_of(self, launch: Launch) -> Path:
        """Where the processes of a start say what the loop costs."""
        return self.place / f"{launch.name()}.json"
