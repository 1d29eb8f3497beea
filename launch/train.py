"""Train Recurrent BART: `deepspeed launch/train.py --deepspeed ds_configs/zero3.json`."""

import sys

from recurrent_bart.distributed import SharedError
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import launched_rank, start_processes
from recurrent_bart.training.experiment import run_experiment


def main(argv: list[str]) -> int:
    """Parse, train, report."""
    is_first = launched_rank() == 0
    try:
        arguments = parse_arguments(argv)
        environment = start_processes(arguments.run.timeout_minutes)
        folder = run_experiment(arguments, environment)
    except SharedError:
        # the first process says it
        return 2
    except ValueError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if is_first:
        print(f"\nmodel in {folder}/model; samples in {folder}/samples.md; curves in {folder}/curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
