"""Compare models on memory tasks and on documents: `python launch/study.py recurrence`."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recurrent_bart.studies.definitions import STUDIES, TEXT_STUDIES, Texts, build_study, build_text_study
from recurrent_bart.studies.pool import run_side_by_side
from recurrent_bart.studies.report import draw, read_results, report
from recurrent_bart.studies.single_run import execute
from recurrent_bart.studies.study_run import Run, RunFile
from recurrent_bart.studies.text_report import draw_losses, text_report
from recurrent_bart.studies.text_run import TextRun


def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help=f"study: {', '.join((*STUDIES, *TEXT_STUDIES))}")
    parser.add_argument("--output_dir", type=Path, help="folder of its runs and its report; default: runs/study-NAME")
    parser.add_argument("--devices", type=int, help="GPUs to use; default: all there are, or the processor")
    parser.add_argument("--processes_per_device", type=int, help="runs at once; default: 8 on a GPU, 1 on a processor")
    parser.add_argument("--budget_seconds", type=float, default=math.inf, help="runs are cut off after so many")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--max_steps", type=int, help="steps of a run at most; default: the study's own")
    parser.add_argument("--only", default="", help="leave out runs whose file name does not contain this")
    parser.add_argument("--facts", help="folder of bAbI's train.jsonl and validation.jsonl")
    parser.add_argument("--filler", help="folder of other text, likewise")
    parser.add_argument(
        "--dataset", default="stdlib", help="of the studies document and sections, as in launch/train.py"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, of their runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="their flags of launch/train.py")
    parser.add_argument("--report_only", action="store_true", help="run nothing, make the report again")
    parser.add_argument("--run", type=Path, help="do one run, described in this file; a study starts these itself")
    parser.add_argument("--device", default="cpu", help="where that run computes")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of that run")
    return parser


def main(argv: list[str]) -> int:
    """Parse, run, report."""
    arguments = build_parser().parse_args(argv)
    try:
        return run_one(arguments) if arguments.run else run_study(arguments)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1


def run_one(arguments: argparse.Namespace) -> int:
    """Do one run of a study."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    file = RunFile(arguments.run)
    if "flags" in file.read()["run"]:
        # the runs that need no documents start the sooner without what reads them
        from recurrent_bart.studies.text_training import execute_text

        execute_text(file, device, arguments.budget_seconds)
    else:
        execute(file, device, arguments.budget_seconds)
    return 0


def run_study(arguments: argparse.Namespace) -> int:
    """Do the runs that are not done, then report on all; the number of those that failed decides the exit code."""
    runs = find_runs(arguments)
    folder = arguments.output_dir or Path("runs") / f"study-{arguments.name}"
    n_failed = 0 if arguments.report_only else do_runs(runs, folder, arguments)
    groups = read_results(folder, runs)
    if not groups:
        raise ValueError(f"{folder}: no run came to its end")
    is_text = arguments.name in TEXT_STUDIES
    text, plot = (text_report(groups), "losses.png") if is_text else (report(groups), "accuracy.png")
    (folder / "report.md").write_text(text, encoding="utf-8")
    (draw_losses if is_text else draw)(groups, folder / plot)
    print(f"\n{text}\nreport in {folder}/report.md; plot in {folder}/{plot}", flush=True)
    return min(n_failed, 1)


def find_runs(arguments: argparse.Namespace) -> Sequence[Run]:
    """The runs that are asked for.

    Raises:
        ValueError: There are none.
    """
    texts, seeds = Texts(arguments.facts, arguments.filler, arguments.dataset), range(arguments.seeds)
    runs: list[Any]
    if arguments.name in TEXT_STUDIES:
        runs = build_text_study(arguments.name, texts, seeds, arguments.seconds, **changed_flags(arguments))
    else:
        runs = build_study(arguments.name, texts, seeds)
        runs = [dataclasses.replace(run, max_steps=arguments.max_steps or run.max_steps) for run in runs]
    runs = [run for run in runs if arguments.only in run.file_name()]
    if not runs:
        raise ValueError(f"study {arguments.name}: it has no run with {arguments.only!r} in its file name")
    return runs


def changed_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Flags of launch/train.py that are others than the study's own.

    Raises:
        ValueError: One has no value.
    """
    without = [text for text in arguments.set if "=" not in text]
    if without:
        raise ValueError(f"--set {without[0]}: must be NAME=VALUE")
    changed: dict[str, Any] = dict(text.split("=", 1) for text in arguments.set)
    if arguments.max_steps:
        changed |= {"max_steps": arguments.max_steps}
    return changed


def do_runs(runs: Sequence[Run], folder: Path, arguments: argparse.Namespace) -> int:
    """Start all that are not finished; gives how many failed."""
    places = find_places(arguments.devices, arguments.processes_per_device)
    todo = {folder / run.file_name(): run for run in runs if not RunFile(folder / run.file_name()).is_finished(run)}
    if todo and isinstance(runs[0], TextRun):
        from recurrent_bart.studies.text_training import prepare_documents

        prepare_documents(runs[0])
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before; {len(places)} at once", flush=True)
    threads = 1 if places[0] != "cpu" else max(1, (os.cpu_count() or 1) // len(places))

    def start(file: Path, device: str, seconds_left: float) -> list[str]:
        # not before: of a run that was cut off and is not started again, what there was stays
        RunFile(file).begin(todo[file])
        return worker(file, device, seconds_left, threads)

    n_failed = 0
    for number, ended in enumerate(run_side_by_side(list(todo), places, start, arguments.budget_seconds), start=1):
        n_failed += bool(ended.code)
        print(f"[{number}/{len(todo)}] {ended.file.stem}: {outcome(ended.file, ended.code, ended.said)}", flush=True)
    return n_failed


def find_places(n_devices: int | None, processes_per_device: int | None) -> list[str]:
    """Devices for runs, each as often as it is shared; neighbours in the list are different ones."""
    n_gpus = torch.cuda.device_count() if n_devices is None else n_devices
    if n_gpus > torch.cuda.device_count():
        raise ValueError(f"--devices {n_devices}: there are {torch.cuda.device_count()} GPUs")
    devices = [f"cuda:{number}" for number in range(n_gpus)] or ["cpu"]
    return devices * (processes_per_device or (8 if n_gpus else 1))


def worker(file: Path, device: str, budget_seconds: float, threads: int) -> list[str]:
    """Command that does one run."""
    flags = {"run": file, "device": device, "budget_seconds": budget_seconds, "threads": threads}
    return [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())]


def outcome(file: Path, code: int | None, said: str) -> str:
    """What became of a run, in a line."""
    if code is None:
        return "not started, the time is over"
    if code:
        return f"failed with exit code {code}: {said}"
    record = RunFile(file).read()
    if not record["curve"]:
        return record["stopped"]
    last = record["curve"][-1]
    figures = (f"{name} {last[name]:.3f}" for name in ("token_accuracy", "validation_loss") if name in last)
    return f"{record['stopped']} after {last['step']} steps, {last['seconds']:.0f} s; {', '.join(figures)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
