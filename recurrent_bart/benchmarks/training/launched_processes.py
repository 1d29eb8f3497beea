"""Run of a command with a timeout, after which the process and its children end."""

import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

# number of last output lines that an error message shows
N_LAST_LINES = 3
# Seconds to wait for torchrun to end. torchrun itself waits 30 s for its processes.
GRACE_SECONDS = 60.0
# REPORT: first line of torchrun's failure report. ASIDE: log lines of torchrun and DeepSpeed without information.
REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
ASIDE = re.compile(r"[IW]\d{4} .*torch/distributed/|\[[\d:, -]+\] \[(INFO|WARNING)\]")


def run_process(command: Sequence[str], log: Path, timeout_seconds: float) -> None:
    """Run a command, write its output to the file `log`, and end the command after `timeout_seconds`.

    Raises:
        RuntimeError: The command failed or timed out; the message has the last lines of the output.
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout_seconds)
            problem = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"time limit of {timeout_seconds:g} s reached"
        finally:
            _end(process)
    if problem:
        raise RuntimeError(f"{problem}: {last_output_lines(log.read_text(errors='replace'))}".rstrip(": "))


def last_output_lines(printed: str) -> str:
    """Return the last lines of the output before torchrun's failure report."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    lines_before_report = itertools.takewhile(lambda line: not REPORT.match(line), lines)
    # several processes may print the same line
    informative = list(dict.fromkeys(line for line in lines_before_report if not ASIDE.match(line)))
    return " | ".join((informative or lines)[-N_LAST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children. The signal SIGTERM gives torchrun time to end its own processes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
