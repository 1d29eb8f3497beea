"""Processes that are started, waited for no longer than they may take, and in no case left behind."""

import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

# of what a failed process wrote
N_LAST_LINES = 3
# torchrun gives its processes half a minute to end
GRACE_SECONDS = 60.0
# how torchrun's report of an end that is none begins; what torchrun and DeepSpeed say without need
REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
ASIDE = re.compile(r"[IW]\d{4} .*torch/distributed/|\[[\d:, -]+\] \[(INFO|WARNING)\]")


def run_process(command: Sequence[str], log: Path, timeout_seconds: float) -> None:
    """Run a command, keeping what it prints.

    Args:
        command: The command.
        log: File for it.
        timeout_seconds: When it is ended.

    Raises:
        RuntimeError: It failed or took too long; with the last lines of what it printed.
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout_seconds)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"not over after {timeout_seconds:g} s"
        finally:
            _end(process)
    if problem:
        raise RuntimeError(f"{problem}: {last_output_lines(log.read_text(errors='replace'))}".rstrip(": "))


def last_output_lines(printed: str) -> str:
    """The last lines of what processes printed, before torchrun says at length how they ended."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = itertools.takewhile(lambda line: not REPORT.match(line), lines)
    # several processes may say the same
    told = list(dict.fromkeys(line for line in said if not ASIDE.match(line)))
    return " | ".join((told or lines)[-N_LAST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, with those it started: a signal that asks it to lets torchrun end them."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
