"""Compare Recurrent BART with other long-document models: `python launch/benchmark.py --suite quick`."""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from recurrent_bart.benchmarks.generation import measure as generation
from recurrent_bart.benchmarks.generation import report as generation_report
from recurrent_bart.benchmarks.generation.cases import LOOPS, build_cases
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.benchmarks.models.cases import MODELS, SCHEDULES, SUITES, Case, Group, build_suite
from recurrent_bart.benchmarks.models.checks import find_wrong_results
from recurrent_bart.benchmarks.models.session import Effort, run_groups, write_results
from recurrent_bart.benchmarks.models.tables import LEGEND, draw, group_table
from recurrent_bart.commands.exit_codes import print_mistake
from recurrent_bart.training.flags import FlagParser
from recurrent_bart.training.model_building import SIZES

# suite that compares loops over tokens instead of models
GENERATION = "generation"


def build_parser() -> FlagParser:
    """Build the parser of all flags."""
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--suite", choices=(*SUITES, GENERATION), default="quick", help="benchmark suite; default: %(default)s"
    )
    parser.add_argument("--groups", nargs="+", help="names of the suite's groups (tables) to run; default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to run; default: all")
    parser.add_argument(
        "--model_size",
        choices=SIZES,
        help="size of all models, with random weights; default: tiny, or large for the suites headline and generation",
    )
    parser.add_argument("--segment_size", type=int, help="tokens per segment; default: value of the model size, or 512")
    parser.add_argument(
        "--segments",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="numbers of segments per document in the suites grid and memory; default: 1 4 16 64",
    )
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1],
        help="documents per batch in the suites grid, memory and generation; default: 1",
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[512],
        help="positions that the decoder attends to in the suite generation; default: 512",
    )
    parser.add_argument(
        "--num_beams", type=int, nargs="+", default=[1, 4], help="beams in the suite generation; default: 1 4"
    )
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=LOOPS,
        default=list(LOOPS),
        help="loops over tokens in the suite generation: this package's, Hugging Face's, and Hugging Face's compiled "
        "with a static cache; default: all",
    )
    parser.add_argument(
        "--new_tokens", type=int, default=64, help="tokens per text in the suite generation; default: %(default)s"
    )
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=SCHEDULES,
        help="orders of the grid's cells in the suites grid and memory; default: all",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu; default: cuda if a GPU is available",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="use bfloat16 for weights and activations; default: float32"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="rounds over all cases of a group; cases alternate, so that clock drift affects all; default: %(default)s",
    )
    parser.add_argument(
        "--passes",
        type=int,
        default=2,
        help="timed steps per round and case; 0 measures memory only; default: %(default)s",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="untimed steps before the timed steps; the second captures CUDA graphs; default: %(default)s",
    )
    parser.add_argument(
        "--budget_seconds",
        type=float,
        default=float("inf"),
        help="time in seconds after which no case starts; default: none",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/benchmark"),
        help="folder for results.json and plots; default: %(default)s",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark and print its tables; return the exit code."""
    arguments = build_parser().parse_flags(argv)
    if arguments.suite == GENERATION:
        return compare_loops(arguments, argv)
    try:
        groups = chosen_groups(arguments)
    except ValueError as error:
        return print_mistake(error)
    setting = setting_of(arguments)
    # Keep notes of other models on their settings out of this script's output.
    transformers.logging.set_verbosity_error()
    faults = find_wrong_results(setting.device)
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
        return 1
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(setting)
    effort = Effort(arguments.rounds, arguments.warmup, arguments.passes, arguments.budget_seconds)
    results = run_groups(
        groups, setting, effort, lambda found: write_results(folder / "results.json", found, about | {"command": argv})
    )
    console = Console(width=160)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    for name, group in results.items():
        console.print(group_table(name, group))
    console.print(LEGEND, highlight=False)
    console.print("written:", folder / "results.json", *draw(results, setting.segment_size, folder), highlight=False)
    return 0


def compare_loops(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Measure this package's loop over tokens beside Hugging Face's, and print the table; return the exit code."""
    setting, folder = setting_of(arguments), arguments.output_dir
    try:
        check_sizes(arguments)
    except ValueError as error:
        return print_mistake(error)
    transformers.logging.set_verbosity_error()
    faults = generation.find_wrong_ids(setting)
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(setting)
    sizes = arguments.num_beams, arguments.batch_sizes, arguments.contexts, arguments.new_tokens
    cases = build_cases(*sizes, is_gpu=setting.device.type == "cuda")
    cases = [case for case in cases if case.loop in arguments.loops]
    effort = Effort(arguments.rounds, arguments.warmup, arguments.passes, arguments.budget_seconds)

    def keep(found: generation.Results) -> None:
        generation_report.write_results(folder / "results.json", found, about | {"command": argv})

    results = generation.run_cases(cases, setting, effort, keep)
    console = Console(width=160)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    console.print(generation_report.table(results))
    console.print(generation_report.LEGEND, highlight=False)
    console.print("written:", folder / "results.json", highlight=False)
    return 0


def check_sizes(arguments: argparse.Namespace) -> None:
    """Raise a ValueError if a size of the generation suite is below 1, or texts exceed the position table."""
    for name in ("batch_sizes", "contexts", "num_beams", "new_tokens"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    most = transformers.BartConfig().max_position_embeddings
    if arguments.new_tokens > most:
        raise ValueError(f"--new_tokens {arguments.new_tokens}: must be at most {most}, the positions of the decoder")


def chosen_groups(arguments: argparse.Namespace) -> list[Group]:
    """Return the requested groups of the suite with only the cases that `is_chosen` accepts.

    Raises:
        ValueError: A group is unknown, or no case is left.
    """
    suite = build_suite(arguments.suite, arguments.batch_sizes, arguments.segments, arguments.schedules)
    names = [group.name for group in suite]
    wanted = arguments.groups or names
    if unknown := set(wanted) - set(names):
        raise ValueError(f"--groups {' '.join(sorted(unknown))}: unknown; the suite has the groups {', '.join(names)}")
    chosen = [
        Group(group.name, tuple(case for case in group.cases if is_chosen(case, arguments)))
        for group in suite
        if group.name in wanted
    ]
    if not any(group.cases for group in chosen):
        raise ValueError(f"--models {' '.join(arguments.models)}: no case in the groups {', '.join(wanted)}")
    return [group for group in chosen if group.cases]


def is_chosen(case: Case, arguments: argparse.Namespace) -> bool:
    """Return True if the case's model is requested; cases with a CUDA graph also need a GPU."""
    can_run = not case.graphed or torch.device(arguments.device).type == "cuda"
    return case.model in arguments.models and can_run


def setting_of(arguments: argparse.Namespace) -> BenchmarkSetting:
    """Return the settings that all benchmarked models share."""
    model_size = arguments.model_size or ("large" if arguments.suite in ("headline", GENERATION) else "tiny")
    return BenchmarkSetting(
        model_size=model_size,
        segment_size=arguments.segment_size or SIZES[model_size].get("segment_size", 512),
        device=torch.device(arguments.device),
        dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
    )


def describe(setting: BenchmarkSetting) -> dict[str, Any]:
    """Return the hardware, versions and settings that the results hold for."""
    is_gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if is_gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": setting.model_size,
        "segment_size": setting.segment_size,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
