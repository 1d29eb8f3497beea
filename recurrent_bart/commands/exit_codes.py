"""Exit code of a command: a mistake is one line on standard error and the code 2."""

import sys
from collections.abc import Callable

import torch

from recurrent_bart.training.lifecycle.exit_codes import ExitCode


def code_of(work: Callable[[], int | None], code: int = ExitCode.MISTAKE) -> int:
    """Run a command's work. Return its exit code, or `code` after a ValueError, which is printed on one line."""
    try:
        return work() or ExitCode.DONE
    except ValueError as error:
        print_mistake(error)
        return code


def print_mistake(error: Exception, where: str = "") -> ExitCode:
    """Print an error on one line of standard error. Return the exit code of a mistake."""
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return ExitCode.MISTAKE


def leave_process_group(code: int) -> int:
    """Destroy the process group, if any, and return `code`.

    A process that exits with live threads of the process group sometimes aborts at the end.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code
