"""Train Recurrent BART: `deepspeed launch/train.py --deepspeed ds_configs/zero3.json`."""

import os
import shlex
import signal
import sys
from typing import Any

from recurrent_bart.commands.exit_codes import print_mistake
from recurrent_bart.distributed import SharedError, log_on_first_rank
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import end_processes, launched_rank, start_processes
from recurrent_bart.training.experiment import run_experiment
from recurrent_bart.training.lifecycle.exit_codes import ExitCode
from recurrent_bart.training.lifecycle.faults import describe_fault
from recurrent_bart.training.lifecycle.interruption import Interrupted, handling_signals


def main(argv: list[str]) -> ExitCode:
    """Parse the flags, train, and return the exit code."""
    rank = launched_rank()
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        # All ranks parse the same command line, but some ranks start much earlier than rank 0.
        if rank == 0:
            return print_mistake(error)
        log_on_first_rank(seconds=30)
        return ExitCode.MISTAKE
    try:
        with handling_signals(leave):
            folder = run_experiment(arguments, start_processes(arguments.run.timeout_minutes))
    except Interrupted:
        if rank == 0:
            print(f"continue with --resume {shlex.quote(str(arguments.run.output_dir))}")
        return ExitCode.STOPPED
    except SharedError:
        log_on_first_rank(seconds=1)
        return ExitCode.MISTAKE
    except ValueError as error:
        return print_mistake(error, f" on rank {rank}" if rank else "")
    except Exception as error:
        print(f"fault on rank {rank}: {describe_fault(error)}", file=sys.stderr, flush=True)
        return ExitCode.FAULT
    if rank == 0:
        # pretraining tasks write no samples
        samples = f"; samples in {folder}/samples.md" if (folder / "samples.md").exists() else ""
        print(f"\nmodel in {folder}/model{samples}; curves in {folder}/curves.png")
    return ExitCode.DONE


def leave(number: int, _: Any) -> None:
    """Exit at once after a signal. Before training starts, there is nothing to save."""
    if launched_rank() == 0:
        print(f"stopped    before training began: {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise SystemExit(ExitCode.STOPPED)


def run(argv: list[str]) -> ExitCode:
    """Run the command as a process. Return the exit code, or exit after a fault."""
    code = main(argv)
    if code in (ExitCode.DONE, ExitCode.STOPPED):
        # A rank that exits before the last rank has finished can look like a crash to other ranks and to the launcher.
        end_processes()
        return code
    # Exit without cleanup, which could wait for ranks that in turn wait for this rank.
    sys.stdout.flush()
    os._exit(code)
