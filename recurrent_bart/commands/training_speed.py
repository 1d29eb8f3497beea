"""Measure the cost of processes, sharding and the training loop: `python launch/training_speed.py`."""

import argparse
import functools
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recurrent_bart.benchmarks.training.results import (
    LEFT_OUT,
    MEASURED,
    PARTS,
    Launch,
    Results,
    empty_results,
    lines_of,
    plan,
)
from recurrent_bart.benchmarks.training.session import Starter
from recurrent_bart.benchmarks.training.tables import LEGEND, summary, training_tables
from recurrent_bart.benchmarks.training.workloads import Work
from recurrent_bart.commands.command_line import program_of
from recurrent_bart.commands.exit_codes import leave_process_group, print_mistake
from recurrent_bart.distributed import barrier
from recurrent_bart.files import atomic_write
from recurrent_bart.run_folder import git_commit, versions
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.flags import FlagParser
from recurrent_bart.training.lifecycle.exit_codes import ExitCode
from recurrent_bart.training.lifecycle.interruption import handling_signals
from recurrent_bart.training.zero.deepspeed_config import CONFIGS

SHARDINGS = [CONFIGS / f"{name}.json" for name in ("zero2", "zero3")]
# Steps of a run with its warm-up, warm-up steps, and rounds of the loop benchmark.
EFFORT = {"cuda": {"steps": 40, "warmup": 10, "rounds": 10}, "cpu": {"steps": 8, "warmup": 2, "rounds": 3}}
# First argument of a worker process that this script starts; flags of launch/train.py follow.
WORKER = "--as_worker"
# Entries of the result of `describe` that are printed.
SHOWN = ("device", "torch", "transformers", "deepspeed", "git_commit")


def build_parser() -> FlagParser:
    """Build the parser of this script's flags."""
    parser = FlagParser(
        description=__doc__,
        epilog="Flags of launch/train.py change the workload, for example --model_size large or --wandb_mode offline.",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="benchmarks to run: whole runs, or the loop compared with bare steps; default: both",
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        help="numbers of processes; default: powers of two up to the number of GPUs, or 1 and 2 without GPUs",
    )
    parser.add_argument(
        "--deepspeed",
        type=Path,
        nargs="+",
        default=SHARDINGS,
        help="DeepSpeed configurations to compare; default: zero2.json and zero3.json of ds_configs",
    )
    parser.add_argument("--steps", type=int, help="steps of a run, warm-up included; default: 40 on GPU, 8 on CPU")
    parser.add_argument("--warmup", type=int, help="untimed steps at the start of a run; default: 10 on GPU, 2 on CPU")
    parser.add_argument(
        "--rounds", type=int, help="rounds in which the loop and bare steps alternate; default: 10 on GPU, 3 on CPU"
    )
    parser.add_argument(
        "--timeout_seconds",
        type=float,
        default=240,
        help="time limit of one measurement, in seconds; default: %(default)s",
    )
    parser.add_argument(
        "--budget_seconds",
        type=float,
        default=math.inf,
        help="time in seconds after which no measurement starts; default: no limit",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/training_speed"),
        help="folder for results.json and logs; default: %(default)s",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark, or one of its worker processes. Return the exit code."""
    try:
        if argv[:1] == [WORKER]:
            return measure_here(argv[1], Path(argv[2]), int(argv[3]), argv[4:])
        own, given = build_parser().parse_known_args(argv)
        with handling_signals(leave):
            return measure_all(own, given, argv)
    except ValueError as error:
        return print_mistake(error)


def leave(number: int, _: Any) -> None:
    """Exit after a signal, with the results so far. `Starter` ends the worker processes."""
    raise SystemExit(ExitCode.STOPPED)


def measure_here(part: str, file: Path, n_rounds: int, flags: Sequence[str]) -> int:
    """Measure `part` as one worker process: the steps of a run, or the training loop (rank 0 writes `file`)."""
    # Import late: the parent process needs no training modules.
    from recurrent_bart.benchmarks.training.loop_cost import measure_loop, run_steps
    from recurrent_bart.training.environment import start_processes

    arguments = parse_arguments(flags)
    environment = start_processes(arguments.run.timeout_minutes)
    if part == "runs":
        run_steps(arguments, environment)
    else:
        found = measure_loop(arguments, environment, n_rounds)
        if environment.rank == 0:
            atomic_write(file, json.dumps(asdict(found)))
    barrier()
    return ExitCode.DONE


def measure_all(own: argparse.Namespace, given: Sequence[str], argv: list[str]) -> int:
    """Do all measurements one after the other. Return 1 if a measurement failed, else 0."""
    ends = time.monotonic() + own.budget_seconds
    numbers = find_processes(own.processes)
    results = empty_results(plan(own.parts, numbers, find_shardings(own.deepspeed)))
    work, about = find_work(own, given), describe(argv)
    folder = own.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    # All runs use the same number of threads, so that they differ only in their processes.
    n_threads = max(1, torch.get_num_threads() // max(numbers))

    def keep(launch: Launch) -> None:
        atomic_write(folder / "results.json", json.dumps(about | {"results": lines_of(results)}, indent=1))
        print(summary(launch, results[launch]), flush=True)

    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as place:
            command = functools.partial(command_of, n_rounds=work.rounds, n_threads=n_threads)
            Starter(work, Path(place), folder, command, own.timeout_seconds).fill(results, ends, keep)
    finally:
        # After a signal, print the results so far.
        print_results(results, about)
    print(f"results in {folder}/results.json")
    return int(any(found.outcome not in (MEASURED, LEFT_OUT) for found in results.values()))


def find_work(own: argparse.Namespace, given: Sequence[str]) -> Work:
    """Return the workload, with the requested numbers of steps or the defaults of the device.

    Raises:
        ValueError: A flag is unknown, out of range or not allowed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {name: getattr(own, name) for name in EFFORT[device]}
    effort = EFFORT[device] | {name: number for name, number in asked.items() if number is not None}
    return Work(device, tuple(given), **effort)


def find_processes(asked: Sequence[int] | None) -> Sequence[int]:
    """Return the requested numbers of processes, or all powers of two up to the number of GPUs.

    Raises:
        ValueError: A number is below 1 or above the number of GPUs.
    """
    n_gpus = torch.cuda.device_count()
    for number in asked or ():
        if number < 1 or (n_gpus and number > n_gpus):
            most = f", and at most {n_gpus}, the number of GPUs" if n_gpus else ""
            raise ValueError(f"--processes {number}: must be at least 1{most}")
    return asked or [2**power for power in range((n_gpus or 2).bit_length())]


def find_shardings(files: Sequence[Path]) -> Sequence[Path]:
    """Return the paths of the DeepSpeed configurations. Results name each configuration by its file name.

    Raises:
        ValueError: Two configurations have the same file name.
    """
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"--deepspeed {' '.join(map(str, files))}: two files have the same name; rename one")
    return files


def command_of(launch: Launch, flags: Sequence[str], file: Path, n_rounds: int, n_threads: int) -> list[str]:
    """Return the command that starts the worker processes on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={launch.n_processes}"]
    worker = [*program_of("training-speed"), WORKER, launch.part, str(file), str(n_rounds)]
    return ["env", f"OMP_NUM_THREADS={n_threads}", *torchrun, *worker, *flags]


def describe(argv: list[str]) -> dict[str, Any]:
    """Return the hardware, versions and command that the results hold for."""
    n_gpus = torch.cuda.device_count()
    device = f"{n_gpus} x {torch.cuda.get_device_name(0)}" if n_gpus else f"CPU {platform.machine()}"
    return {"device": device, **versions(), "git_commit": git_commit(), "command": argv}


def print_results(results: Results, about: dict[str, Any]) -> None:
    """Print the results as tables."""
    console = Console(width=160)
    console.print("\n" + ", ".join(f"{name} {about[name]}" for name in SHOWN), highlight=False)
    for table in training_tables(results):
        console.print(table)
    console.print(LEGEND, highlight=False)


def run(argv: list[str]) -> int:
    """Run the command as a process. Return the exit code."""
    return leave_process_group(main(argv))
