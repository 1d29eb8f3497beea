"""How a run ended, as its exit code says it."""

import enum
from dataclasses import asdict, dataclass

from recurrent_bart.training.lifecycle.interruption import Interrupted


class ExitCode(enum.IntEnum):
    """What launch/train.py returns to whoever started it."""

    DONE = 0
    # nobody's mistake, or nobody's that is known: memory, disk, a process that was lost; resuming may help
    FAULT = 1
    # a flag, a file or the documents must be changed first
    MISTAKE = 2
    # EX_TEMPFAIL of sysexits.h: --resume goes on from a whole checkpoint
    STOPPED = 75


@dataclass(frozen=True)
class Outcome:
    """Written to RUN/outcome.json: some launchers return a code of their own, torchrun 1 for every other than 0.

    Attributes:
        code: Exit code of the first process.
        reason: What stopped it; empty if it came to its end.
        step: Optimizer steps done.
    """

    code: int
    reason: str
    step: int

    @classmethod
    def of(cls, error: BaseException | None, step: int) -> "Outcome":
        """The outcome of a run that ended with an error, or with none."""
        return cls(code_of(error), "" if error is None else str(error) or type(error).__name__, step)

    def fields(self) -> dict[str, object]:
        """As it is written."""
        return asdict(self)


def code_of(error: BaseException | None) -> ExitCode:
    """The exit code that stands for an error, or for none."""
    if error is None:
        return ExitCode.DONE
    if isinstance(error, Interrupted):
        return ExitCode.STOPPED
    return ExitCode.MISTAKE if isinstance(error, ValueError) else ExitCode.FAULT
