"""Train Recurrent BART: `deepspeed launch/train.py --deepspeed ds_configs/zero3.json`."""

import sys

import deepspeed.comm

from recurrent_bart.distributed import SharedError
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import launched_rank, start_processes
from recurrent_bart.training.experiment import run_experiment


def main(argv: list[str]) -> int:
    """Parse, train, report."""
    rank = launched_rank()
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        # all processes read the same command line
        return fail(error) if rank == 0 else 2
    try:
        folder = run_experiment(arguments, start_processes(arguments.run.timeout_minutes))
    except SharedError:
        # the first process says it
        return 2
    except ValueError as error:
        return fail(error, f" on rank {rank}" if rank else "")
    if rank == 0:
        print(f"\nmodel in {folder}/model; samples in {folder}/samples.md; curves in {folder}/curves.png")
    return 0


def fail(error: ValueError, where: str = "") -> int:
    """Say in one line what is wrong; the return code."""
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == 0:
        # a process that leaves while another one is still at work can look like a crash to it and to the launcher
        deepspeed.comm.barrier()
        deepspeed.comm.destroy_process_group()
    sys.exit(code)
