"""Measure memory and speed by number of segments: `python launch/benchmark.py --model_size base`."""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from recurrent_bart.configuration_recurrent_bart import SCHEDULES
from recurrent_bart.data.rows import TASKS
from recurrent_bart.modeling_recurrent_bart import CHECKPOINTING_GRAINS
from recurrent_bart.training.benchmark import Benchmark, Case, Measurement, all_cases
from recurrent_bart.training.model_building import SIZES

MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    """Parser of all flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_size", choices=SIZES, default="tiny", help="size of the model, from scratch")
    parser.add_argument("--segment_size", type=int, help="tokens of a segment; default: the size's own")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of segments")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what has a target")
    parser.add_argument("--bptt_depths", type=int, nargs="+", default=[0, 2, -1], help="horizons of gradient")
    parser.add_argument(
        "--gradient_checkpointing", nargs="+", choices=CHECKPOINTING_GRAINS, default=CHECKPOINTING_GRAINS, help="grains"
    )
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["auto"], help="orders of computation")
    parser.add_argument("--batch_size", type=int, default=1, help="documents")
    parser.add_argument("--passes", type=int, default=0, help="timed passes of each; 0: memory alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to measure")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bfloat16, not float32")
    parser.add_argument("--json", type=Path, help="file to write every figure to")
    return parser


def main(argv: list[str]) -> int:
    """Parse, measure, print."""
    arguments = build_parser().parse_args(argv)
    device = torch.device(arguments.device)
    benchmark = Benchmark(
        model_size=arguments.model_size,
        segment_size=arguments.segment_size,
        batch_size=arguments.batch_size,
        device=device,
        dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        n_passes=arguments.passes,
    )
    grains, schedules = arguments.gradient_checkpointing, arguments.schedules
    cases = all_cases(arguments.tasks, arguments.bptt_depths, grains, schedules)
    results = {case: list(benchmark.run(case, arguments.segments)) for case in cases}
    console = Console(width=120)
    console.print(f"{describe(device)}; {' '.join(argv)}", highlight=False)
    console.print(memory_table(results, arguments.segments))
    if arguments.passes:
        console.print(speed_table(results, arguments.segments))
    if arguments.json:
        lines = [asdict(case) | asdict(measured) for case, row in results.items() for measured in row]
        arguments.json.write_text(json.dumps({"device": describe(device), "command": argv, "results": lines}, indent=1))
    return 0


def describe(device: torch.device) -> str:
    """The device and the versions that the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"processor {platform.machine()}"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def memory_table(results: dict[Case, list[Measurement]], numbers: list[int]) -> Table:
    """Peak memory in MiB."""
    rows = {case: [f"{measured.peak_bytes / MIB:.0f}" for measured in row] for case, row in results.items()}
    return _table("peak MiB beyond weights and gradients, by segments", rows, numbers)


def speed_table(results: dict[Case, list[Measurement]], numbers: list[int]) -> Table:
    """Document tokens a second, and slowest over fastest pass."""
    rows = {case: [f"{m.tokens_per_second:,.0f} ({m.spread:.2f})" for m in row] for case, row in results.items()}
    return _table("document tokens per second, forward and backward (slowest over fastest), by segments", rows, numbers)


def _table(title: str, rows: dict[Case, list[str]], numbers: list[int]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("task", "bptt_depth", "checkpointing", "schedule"):
        table.add_column(name)
    for number in numbers:
        table.add_column(str(number), justify="right")
    for case, figures in rows.items():
        table.add_row(case.task, str(case.bptt_depth), case.checkpointing, case.schedule, *figures)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
