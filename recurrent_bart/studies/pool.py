"""Process pool that runs a study's runs in parallel on several devices."""

import queue
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# a process prints this and the file's path when a run ends
ENDED = "ended: "
# number of output lines that report a failure
LAST_LINES = 3


@dataclass(frozen=True)
class Ended:
    """End of one run.

    Attributes:
        file: File of the run.
        code: 0: the file holds the result. None: the time was over before the run began. Otherwise: exit code of the
            process, which ended before the run did.
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
    """Start one process per group of files, at most one per entry of `places`, and yield each run as it ends.

    Args:
        groups: Run files by process. A process prints to a `.log` file beside its first run file.
        places: Devices. A device that n processes may use appears n times.
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
                # reported if starting the process raises
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
    """Return exit code and last lines of a process, and remove runs from `left` as they end."""
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
