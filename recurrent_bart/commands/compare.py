"""Compare systems by their predictions: `python launch/compare.py RUN_OR_FILE RUN_OR_FILE ...`."""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from recurrent_bart.commands.exit_codes import code_of
from recurrent_bart.evaluation.comparison import (
    System,
    align,
    blind_pairs,
    compare_scores,
    describe_comparison,
    differences_to_first,
    mean_by_text,
    most_different_first,
    read_systems,
    score_table,
)
from recurrent_bart.evaluation.model_scores import MODEL_SCORES
from recurrent_bart.evaluation.predictions import Prediction
from recurrent_bart.files import atomic_write
from recurrent_bart.monitoring.fields import SCORES, WORD_SCORES
from recurrent_bart.report.comparison_page import Entry, draw_differences, write_comparison_page
from recurrent_bart.training.flags import FlagParser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this script."""
    parser = FlagParser(description="Compare systems by the texts that they generated for the same targets.")
    parser.add_argument(
        "systems",
        nargs="+",
        metavar="[NAME=]RUN_OR_FILE[,...]",
        help="a system: predictions.jsonl, or a folder with it; files of one system with several seeds are joined by "
        "commas, in the same order for each system; differences are to the first system",
    )
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="HTML page; default: %(default)s")
    parser.add_argument(
        "--sort_by", default="rouge1", help="score by which the texts that differ most come first; default: %(default)s"
    )
    parser.add_argument("--n_texts", type=int, default=50, help="targets shown on the page; default: %(default)s")
    parser.add_argument(
        "--blind", type=Path, metavar="FOLDER", help="write pairs of texts for human judges, without the systems' names"
    )
    parser.add_argument("--n_pairs", type=int, default=50, help="pairs for --blind, at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="seed of the pairs and their order; default: %(default)s")
    return parser.parse_flags(argv)


def compare(arguments: argparse.Namespace) -> None:
    """Print the differences, and write the page and the blind pairs.

    Raises:
        ValueError: The systems cannot be compared, or a file cannot be written.
    """
    if len(arguments.systems) < 2:
        raise ValueError("one system is given: give at least two, the first of which is the reference")
    for name in ("n_texts", "n_pairs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if arguments.blind and (arguments.blind / "pairs.csv").exists():
        raise ValueError(
            f"--blind {arguments.blind}: the folder has pairs.csv, perhaps with answers; give a new folder"
        )
    systems = read_systems(arguments.systems)
    means = mean_by_text(systems, arguments.sort_by)
    table, caption = score_table(compare_scores(systems)), describe_comparison(systems)
    print(caption, *align(table), sep="\n")
    entries = [entry(systems, id, arguments.sort_by) for id in most_different_first(means)[: arguments.n_texts]]
    names = [system.name for system in systems]
    try:
        svg = draw_differences(differences_to_first(means, names), arguments.sort_by, names[0])
        descriptions = SCORES | WORD_SCORES | MODEL_SCORES
        write_comparison_page(arguments.output, names, caption, entries, table, descriptions, svg)
        print(f"page in {arguments.output}")
        if arguments.blind:
            write_blind_pairs(arguments.blind, systems, arguments.n_pairs, arguments.seed)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be written ({error.strerror})") from error


def entry(systems: Sequence[System], id: str, score: str) -> Entry:
    """Return the texts of one target: each system's text of its first seed."""
    found = [system.seeds[0][id] for system in systems]
    texts = []
    for number, (system, item) in enumerate(zip(systems, found, strict=True)):
        value = item.scores[score]
        texts.append((number, system.name, "" if value is None else f"{score} {value:.1f}", item.text))
    title = f"{id}, {found[0].n_source_tokens:,} tokens"
    return Entry(title, texts, found[0].targets, source_of(found), found[0].query)


def source_of(predictions: Sequence[Prediction]) -> str | None:
    """Return the source text of a target, which only some systems may have written; None: no system."""
    return next((item.source for item in predictions if item.source), None)


def write_blind_pairs(folder: Path, systems: Sequence[System], n_pairs: int, seed: int) -> None:
    """Write pairs.html to read, pairs.csv to fill in, and key.csv, which judges must not see."""
    pairs = list(enumerate(blind_pairs(systems, n_pairs, seed), start=1))
    if not pairs:
        raise ValueError(f"--blind {folder}: all texts of the systems are equal")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        Entry(
            f"pair {number}",
            [(0, "A", "", pair.text_a), (1, "B", "", pair.text_b)],
            pair.prediction.targets,
            source_of([system.seeds[0][pair.prediction.id] for system in systems]),
            pair.prediction.query,
        )
        for number, pair in pairs
    ]
    caption = "Which text is the better summary? Write A, B or = into the column preferred of pairs.csv."
    write_comparison_page(folder / "pairs.html", ["A", "B"], caption, entries)
    write_csv(folder / "pairs.csv", [["pair", "preferred"], *([number, ""] for number, _ in pairs)])
    key = [[number, pair.prediction.id, pair.a, pair.b] for number, pair in pairs]
    write_csv(folder / "key.csv", [["pair", "id", "A", "B"], *key])
    print(f"{len(pairs)} blind pairs in {folder / 'pairs.html'}, answers in pairs.csv, systems in key.csv")


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write the rows as CSV, atomically."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    atomic_write(path, file.getvalue())


def main(argv: list[str]) -> int:
    """Compare the systems. Return the exit code."""
    arguments = parse_arguments(argv)
    return code_of(lambda: compare(arguments))
