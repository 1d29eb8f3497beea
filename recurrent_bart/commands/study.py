"""Compare models on memory tasks and on documents: `python launch/study.py recurrence`."""

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recurrent_bart.commands.command_line import program_of
from recurrent_bart.commands.exit_codes import code_of
from recurrent_bart.execution.graphed_wavefront import share_device
from recurrent_bart.studies.definitions import STUDIES, Texts, build_study
from recurrent_bart.studies.documents.definitions import TEXT_STUDIES, build_text_study
from recurrent_bart.studies.documents.report import draw_losses, text_report
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.memory.single_run import execute
from recurrent_bart.studies.memory.turns import Turns, take_turns
from recurrent_bart.studies.pool import ENDED, Ended, run_side_by_side
from recurrent_bart.studies.report import draw, read_results, report
from recurrent_bart.studies.study_run import Run, RunFile
from recurrent_bart.training.flags import FlagParser

# Number of hardware queues of a GPU, equal to PyTorch's number of streams. With CUDA's default of 8, runs wait for each
# other.
QUEUES = 32


def build_parser() -> FlagParser:
    """Build the parser of all flags."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("name", nargs="?", help=f"name of the study: {', '.join((*STUDIES, *TEXT_STUDIES))}")
    parser.add_argument("--output_dir", type=Path, help="folder for runs and report; default: runs/study-NAME")
    parser.add_argument("--devices", type=int, help="number of GPUs; default: all GPUs, or the CPU")
    parser.add_argument(
        "--processes_per_device", type=int, default=1, help="simultaneous processes per device; default: %(default)s"
    )
    parser.add_argument(
        "--runs_at_once", type=int, help="runs that alternate in one process; default: 16 on a GPU, 1 on CPU"
    )
    parser.add_argument(
        "--budget_seconds",
        type=float,
        default=math.inf,
        help="time in seconds after which all runs stop; default: no limit",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per setting; default: %(default)s")
    parser.add_argument("--max_steps", type=int, help="maximum optimizer steps of a run; default: value of the study")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="do only runs whose name or file name contains one of these texts; default: all runs",
    )
    parser.add_argument("--facts", help="folder with train.jsonl and validation.jsonl of bAbI; default: none")
    parser.add_argument(
        "--filler", help="folder with train.jsonl and validation.jsonl of distractor text; default: none"
    )
    parser.add_argument(
        "--dataset",
        default="stdlib",
        help="documents of the studies on documents, as in launch/train.py; default: %(default)s",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="training time in seconds of each run in a study on documents; default: 300, and no limit for pretrained "
        "models, which train for --max_steps",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="flags of launch/train.py for the studies on documents; pretrained models need model_name_or_path=FOLDER; "
        "default: none",
    )
    parser.add_argument("--report_only", action="store_true", help="start no run, only write the report again")
    worker = parser.add_argument_group("internal flags of one process, set by the study")
    worker.add_argument("--run", type=Path, nargs="+", help="files that describe the runs to do")
    worker.add_argument("--device", default="cpu", help="PyTorch device; default: %(default)s")
    worker.add_argument(
        "--deadline", type=float, default=math.inf, help="end of the process, in seconds since 1970; default: none"
    )
    worker.add_argument("--threads", type=int, default=1, help="CPU threads; default: %(default)s")
    return parser


def main(argv: list[str]) -> int:
    """Run the whole study. With --run, do only the runs of one process. Return the exit code."""
    arguments = build_parser().parse_flags(argv)
    return code_of(lambda: work(arguments) if arguments.run else run_study(arguments), code=1)


def work(arguments: argparse.Namespace) -> int:
    """Do runs of a study in this process. Results go to the run files. Print a line at the end of each run."""
    torch.set_num_threads(arguments.threads)
    share_device(arguments.processes_per_device)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    files = [RunFile(path) for path in arguments.run]
    described = {file: file.read()["run"] for file in files}

    def begin(file: RunFile) -> Turns[None]:
        if "flags" in described[file]:
            # Import late: runs on memory tasks start faster without the modules for documents.
            from recurrent_bart.studies.documents.training import execute_text

            execute_text(file, device, arguments.deadline - time.time())
        else:
            yield from execute(file, device, arguments.deadline)

    is_over = False
    in_time = itertools.takewhile(lambda _: not is_over and time.time() < arguments.deadline, files)
    for file, error in take_turns(in_time, begin, arguments.runs_at_once or 1, device):
        if error is not None:
            file.fail(error)
        # "budget": the run ended its training before the last step, for its final tests. No other run begins
        is_over = is_over or file.read().get("stopped") == "budget"
        print(f"{ENDED}{file.path}", flush=True)
    return 0


def run_study(arguments: argparse.Namespace) -> int:
    """Do all unfinished runs and write the report. Return 1 if a run failed, else 0."""
    runs = find_runs(arguments)
    folder = arguments.output_dir or Path("runs") / f"study-{arguments.name}"
    n_failed = 0 if arguments.report_only else do_runs(runs, folder, arguments)
    groups = read_results(folder, runs)
    if not groups:
        raise ValueError(f"{folder}: no run has finished")
    is_text = arguments.name in TEXT_STUDIES
    text, plot = (text_report(groups), "losses.png") if is_text else (report(groups), "accuracy.png")
    (folder / "report.md").write_text(text, encoding="utf-8")
    (draw_losses if is_text else draw)(groups, folder / plot)
    print(f"\n{text}\nreport in {folder}/report.md; plot in {folder}/{plot}", flush=True)
    return min(n_failed, 1)


def find_runs(arguments: argparse.Namespace) -> Sequence[Run]:
    """Return the descriptions of the requested runs.

    Raises:
        ValueError: No run matches.
    """
    seeds = range(arguments.seeds)
    runs: list[Any]
    if arguments.name in TEXT_STUDIES:
        runs = build_text_study(arguments.name, arguments.dataset, seeds, arguments.seconds, **changed_flags(arguments))
    else:
        runs = build_study(arguments.name, Texts(arguments.facts, arguments.filler), seeds)
        runs = [dataclasses.replace(run, max_steps=arguments.max_steps or run.max_steps) for run in runs]
    chosen = [run for run in runs if any(text in run.file_name() or text in run.name for text in arguments.only)]
    if not chosen:
        names = ", ".join(repr(name) for name in dict.fromkeys(run.name for run in runs))
        raise ValueError(
            f"--only {' '.join(map(repr, arguments.only))}: no run of the study {arguments.name} has this text in its "
            f"name or its file name; the names are {names}"
        )
    return chosen


def changed_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of launch/train.py that replace the study's values.

    Raises:
        ValueError: A flag has no value.
    """
    without = [text for text in arguments.set if "=" not in text]
    if without:
        raise ValueError(f"--set {without[0]}: must be NAME=VALUE")
    changed: dict[str, Any] = dict(text.split("=", 1) for text in arguments.set)
    if arguments.max_steps:
        changed |= {"max_steps": arguments.max_steps}
    return changed


def do_runs(runs: Sequence[Run], folder: Path, arguments: argparse.Namespace) -> int:
    """Do all unfinished runs. Return the number of failed runs."""
    deadline = time.time() + arguments.budget_seconds
    places = find_places(arguments.devices, arguments.processes_per_device)
    todo = [run for run in runs if not RunFile(folder / run.file_name()).is_finished(run)]
    first = runs[0]
    is_text = isinstance(first, TextRun)
    if todo and isinstance(first, TextRun):
        from recurrent_bart.studies.documents.training import prepare_documents

        prepare_documents(first)
    for run in todo:
        RunFile(folder / run.file_name()).begin(run)
    runs_at_once = find_runs_at_once(arguments.runs_at_once, is_text, places[0])
    groups = deal([folder / run.file_name() for run in todo], len(places), runs_at_once)
    print(
        f"{len(runs)} runs, {len(runs) - len(todo)} already finished; {len(places)} processes, runs at once in each "
        f"process: {runs_at_once}",
        flush=True,
    )
    flags = {
        "runs_at_once": runs_at_once,
        "deadline": deadline,
        "processes_per_device": arguments.processes_per_device,
        "threads": 1 if places[0] != "cpu" else max(1, (os.cpu_count() or 1) // len(places)),
    }
    n_failed = 0
    started = run_side_by_side(groups, places, lambda files, device: worker(files, device, **flags), deadline)
    for number, ended in enumerate(started, start=1):
        has_failed, text = outcome(ended)
        n_failed += has_failed
        print(f"[{number}/{len(todo)}] {ended.file.stem}: {text}", flush=True)
    return n_failed


def find_runs_at_once(asked: int | None, is_text: bool, device: str) -> int:
    """Return the number of runs that alternate in one process.

    Raises:
        ValueError: More than 1 is requested, but each run on documents needs its process.
    """
    if is_text and (asked or 1) > 1:
        raise ValueError(
            f"--runs_at_once {asked}: must be 1 in a study on documents, because each run needs a separate process"
        )
    return asked or (1 if is_text or device == "cpu" else 16)


def deal(files: Sequence[Path], n_processes: int, runs_at_once: int) -> list[Sequence[Path]]:
    """Distribute run files over groups, one process per group. If `runs_at_once` is 1, each group has one file."""
    n_groups = len(files) if runs_at_once == 1 else min(n_processes, len(files))
    return [files[number::n_groups] for number in range(n_groups)]


def find_places(n_devices: int | None, processes_per_device: int) -> list[str]:
    """Return one device per process. Consecutive processes use different devices."""
    n_gpus = torch.cuda.device_count() if n_devices is None else n_devices
    if n_gpus > torch.cuda.device_count():
        raise ValueError(f"--devices {n_devices}: this machine has {torch.cuda.device_count()} GPUs")
    devices = [f"cuda:{number}" for number in range(n_gpus)] or ["cpu"]
    return devices * processes_per_device


def worker(files: Sequence[Path], device: str, **flags: Any) -> list[str]:
    """Return the command line that does the runs of `files` in one process."""
    queues = [] if device == "cpu" else ["env", f"CUDA_DEVICE_MAX_CONNECTIONS={QUEUES}"]
    told = (f"--{name}={value}" for name, value in {"device": device, **flags}.items())
    return [*queues, sys.executable, *program_of("study"), *told, "--run", *map(str, files)]


def outcome(ended: Ended) -> tuple[bool, str]:
    """Return True if the run failed, else False, and a line about its result."""
    if ended.code is None:
        return False, "not started: the time limit is reached"
    if ended.code:
        return True, f"failed with exit code {ended.code}: {ended.said}"
    record = RunFile(ended.file).read()
    if "error" in record:
        return True, f"failed: {record['error']}"
    if not record["curve"]:
        return False, record["stopped"]
    last = record["curve"][-1]
    scores = (f"{name} {last[name]:.3f}" for name in ("token_accuracy", "validation_loss") if name in last)
    return False, f"{record['stopped']} after {last['step']} steps, {last['seconds']:.0f} s; {', '.join(scores)}"
