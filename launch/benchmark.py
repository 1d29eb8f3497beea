"""Measure our model beside others that read long documents: `python launch/benchmark.py --suite quick`."""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from recurrent_bart.benchmarks.models.cases import MODELS, SCHEDULES, SUITES, Group, build_suite
from recurrent_bart.benchmarks.models.checks import find_wrong_results
from recurrent_bart.benchmarks.models.session import Effort, run_groups, write_results
from recurrent_bart.benchmarks.models.subjects import Place
from recurrent_bart.benchmarks.models.tables import LEGEND, draw, group_table
from recurrent_bart.training.flags import FlagParser
from recurrent_bart.training.model_building import SIZES


def build_parser() -> FlagParser:
    """Parser of all flags."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="quick", help="what is measured")
    parser.add_argument("--groups", nargs="+", help="parts of the suite, by the names in its tables; default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models, all unless given")
    parser.add_argument("--model_size", choices=SIZES, help="of all, from scratch; default: tiny, headline large")
    parser.add_argument("--segment_size", type=int, help="tokens of a segment; default: the size's own")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 4, 16, 64], help="of grid and memory")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1], help="documents, of grid and memory")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="of grid and memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bfloat16, not float32")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each case beside the others of its group")
    parser.add_argument("--passes", type=int, default=2, help="timed steps of a turn; 0: memory alone")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them; the second records what is read")
    parser.add_argument("--budget_seconds", type=float, default=float("inf"), help="nothing is begun after so long")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"), help="for results.json and plots")
    return parser


def main(argv: list[str]) -> int:
    """Parse, check, measure, print."""
    arguments = build_parser().parse_flags(argv)
    try:
        groups = chosen_groups(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place = place_of(arguments)
    # what others say about their own settings would come between the lines of each case
    transformers.logging.set_verbosity_error()
    faults = find_wrong_results(place.device)
    if faults:
        print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr)
        return 1
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    about = describe(place)
    effort = Effort(arguments.rounds, arguments.warmup, arguments.passes, arguments.budget_seconds)
    results = run_groups(
        groups, place, effort, lambda found: write_results(folder / "results.json", found, about | {"command": argv})
    )
    console = Console(width=160)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    for name, group in results.items():
        console.print(group_table(name, group))
    console.print(LEGEND, highlight=False)
    console.print("written:", folder / "results.json", *draw(results, place.segment_size, folder), highlight=False)
    return 0


def chosen_groups(arguments: argparse.Namespace) -> list[Group]:
    """Groups of the suite that were asked for, with the models that were.

    Raises:
        ValueError: There is no such group, or no case of these models in it.
    """
    suite = build_suite(arguments.suite, arguments.batch_sizes, arguments.segments, arguments.schedules)
    names = [group.name for group in suite]
    wanted = arguments.groups or names
    if unknown := set(wanted) - set(names):
        raise ValueError(f"--groups {' '.join(sorted(unknown))}: the suite has {', '.join(names)}")
    chosen = [
        Group(group.name, tuple(case for case in group.cases if case.model in arguments.models))
        for group in suite
        if group.name in wanted
    ]
    if not any(group.cases for group in chosen):
        raise ValueError(f"no case of {', '.join(arguments.models)} in {', '.join(wanted)}")
    return [group for group in chosen if group.cases]


def place_of(arguments: argparse.Namespace) -> Place:
    """What all models share."""
    model_size = arguments.model_size or ("large" if arguments.suite == "headline" else "tiny")
    return Place(
        model_size=model_size,
        segment_size=arguments.segment_size or SIZES[model_size].get("segment_size", 512),
        device=torch.device(arguments.device),
        dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
    )


def describe(place: Place) -> dict[str, Any]:
    """What the figures hold for."""
    is_gpu = place.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(place.device) if is_gpu else f"processor {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": place.model_size,
        "segment_size": place.segment_size,
        "dtype": str(place.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
