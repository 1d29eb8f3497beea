"""Runs of a study side by side, in processes each of which has one or several of them, on one of some devices."""

import queue
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# in front of a file's name, in a line that a process prints when the run of that file has ended
ENDED = "ended: "
# of what a failed process wrote
LAST_LINES = 3


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        file: Its file.
        code: 0: the file says it; None: it was not begun, for time had run out; else its process ended without it, with
            this exit code.
        said: Of such a process the last lines.
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
    """Start a process for each group of files, as many at once as there are places, and give each file as its run ends.

    Args:
        groups: What is run. What a process writes is kept beside its first file, in a `.log`.
        places: Devices, each as often as processes may use it.
        command: Makes the command from files and a device.
        deadline: None is started after this time, as `time.time` has it.
    """
    free: queue.Queue[str] = queue.Queue()
    ended: queue.Queue[Ended] = queue.Queue()
    for place in places:
        free.put(place)

    def run(files: Sequence[Path]) -> None:
        device, left, code, said = free.get(), list(files), None, ""
        try:
            if time.time() < deadline:
                # until its own end says otherwise
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
    """Exit code and last lines of a process; files whose runs have ended on the way are no longer left."""
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
