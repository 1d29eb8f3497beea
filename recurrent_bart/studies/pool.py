"""Process pool that does the runs of a study in parallel on several devices."""

import queue
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# a process prints this text and the path of the run file when a run ends
ENDED = "ended: "
# number of last output lines that a failure message shows
LAST_LINES = 3


@dataclass(frozen=True)
class Ended:
    """End of one run.

    Attributes:
        file: File of the run.
        code: 0: the file holds the result. None: no time was left to begin the run. Any other value: exit code of the
            process, which ended before the run was finished.
        said: Last lines that the failed process printed.
    """

    file: Path
    code: int | None
    said: str = ""


def run_side_by_side(
    groups: Sequence[Sequence[Path]],
    places: Sequence[str],
    command: Callable[[Sequence[Path], str], list[str]],
    deadline: float,
) -> Iterator[Ended]:
    """Start one process per group of run files, and yield each run as it ends.

    Args:
        groups: Run files by process. A process prints to a `.log` file beside its first run file.
        places: Devices, one entry per process that may run at the same time. Devices may repeat.
        command: Builds the command line from run files and a device.
        deadline: Time after which no process starts, on the clock of `time.time`.
    """
    free: queue.Queue[str] = queue.Queue()
    ended: queue.Queue[Ended] = queue.Queue()
    for place in places:
        free.put(place)

    def run(files: Sequence[Path]) -> None:
        device, left, code, said = free.get(), list(files), None, ""
        try:
            if time.time() < deadline:
                # this code is reported if starting the process raises an exception
                code = 1
                code, said = _run(command(files, device), left, ended)
        finally:
            free.put(device)
            for file in left:
                ended.put(Ended(file, code or None, said))

    with ThreadPoolExecutor(max_workers=len(places)) as threads:
        running = [threads.submit(run, files) for files in groups]
        for _ in range(sum(map(len, groups))):
            yield ended.get()
        for process in running:
            process.result()


def _run(command: list[str], left: list[Path], ended: queue.Queue[Ended]) -> tuple[int, str]:
    """Run a process. Return its exit code and last output lines. Remove each run that ends from `left`."""
    log = left[0].with_suffix(".log")
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            output.write(line)
            output.flush()
            file = Path(line.removeprefix(ENDED).rstrip("\n"))
            if line.startswith(ENDED) and file in left:
                left.remove(file)
                ended.put(Ended(file, 0))
    return process.returncode, "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
