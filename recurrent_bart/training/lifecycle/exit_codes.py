"""Exit code and outcome of a run."""

import enum
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from recurrent_bart.training.lifecycle.interruption import Interrupted


class ExitCode(enum.IntEnum):
    """Exit code of launch/train.py."""

    DONE = 0
    # no known user error: out of memory, full disk, lost process; resuming may help
    FAULT = 1
    # a flag, a file or the documents must be changed first
    MISTAKE = 2
    # EX_TEMPFAIL of sysexits.h: the run can be continued with --resume
    STOPPED = 75


class AlreadyFinished(Exception):  # noqa: N818 - not an error
    """Notice that a resumed run has nothing to do. The run folder is unchanged."""


@dataclass(frozen=True)
class Outcome:
    """Content of RUN/outcome.json. Some launchers change exit codes: torchrun returns 1 for every code except 0.

    Attributes:
        code: Exit code of rank 0.
        reason: Error that ended the run; empty if the run is complete.
        step: Optimizer steps done.
    """

    code: int
    reason: str
    step: int

    @classmethod
    def of(cls, error: BaseException | None, step: int) -> "Outcome":
        """Build the outcome from the error that ended the run, or from None if the run is complete."""
        return cls(code_of(error), "" if error is None else str(error) or type(error).__name__, step)

    def fields(self) -> dict[str, object]:
        """Return the fields as a dictionary."""
        return asdict(self)


def is_done(outcome: Path) -> bool:
    """Return True if the file outcome.json says that the run was trained to its end."""
    try:
        return json.loads(outcome.read_text(encoding="utf-8"))["code"] == ExitCode.DONE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def code_of(error: BaseException | None) -> ExitCode:
    """Return the exit code for the error that ended the run; None means a complete run."""
    if error is None:
        return ExitCode.DONE
    if isinstance(error, Interrupted):
        return ExitCode.STOPPED
    return ExitCode.MISTAKE if isinstance(error, ValueError) else ExitCode.FAULT
