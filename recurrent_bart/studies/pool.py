"""Runs of a study side by side, each a process of its own on one of some devices."""

import queue
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

# of what a failed process wrote
LAST_LINES = 3


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        file: The file that it was started for.
        code: Its exit code; None: it was not started, for time had run out.
        said: The last lines it wrote.
    """

    file: Path
    code: int | None
    said: str


def run_side_by_side(
    files: Sequence[Path],
    places: Sequence[str],
    command: Callable[[Path, str, float], list[str]],
    budget_seconds: float,
) -> Iterator[Ended]:
    """Start a process for each file, as many at once as there are places, and give each as it ends.

    Args:
        files: What is run. What a process writes is kept beside, in a `.log`.
        places: Devices, each as often as processes may use it.
        command: Makes the command from a file, a device and the seconds that are left.
        budget_seconds: None is started after so many.
    """
    deadline = time.monotonic() + budget_seconds
    free: queue.Queue[str] = queue.Queue()
    for place in places:
        free.put(place)

    def run(file: Path) -> Ended:
        device = free.get()
        try:
            left = deadline - time.monotonic()
            return _run(file, command(file, device, left)) if left > 0 else Ended(file, None, "")
        finally:
            free.put(device)

    with ThreadPoolExecutor(max_workers=len(places)) as threads:
        for future in as_completed([threads.submit(run, file) for file in files]):
            yield future.result()


def _run(file: Path, command: list[str]) -> Ended:
    log = file.with_suffix(".log")
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return Ended(file, code, "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:]))
