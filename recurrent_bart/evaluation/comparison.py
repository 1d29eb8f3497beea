"""Paired comparison of systems by their predictions: differences of scores, and pairs of texts for human judges."""

import itertools
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recurrent_bart.evaluation.bootstrap import Resamples, by_document, resample
from recurrent_bart.evaluation.predictions import FILE_NAME, Prediction, read_predictions

# Number of ids that an error names.
N_NAMED = 3

# id -> prediction
Predictions = dict[str, Prediction]


@dataclass(frozen=True)
class System:
    """Predictions of one system by id, one dictionary per seed."""

    name: str
    seeds: list[Predictions]

    def scores(self, name: str, ids: Sequence[str]) -> np.ndarray:
        """Return a score of each seed and text, `(S, X)`; NaN where it is undefined."""
        return np.array([[seed[id].scores[name] for id in ids] for seed in self.seeds], dtype=float)


@dataclass(frozen=True)
class ScoreRow:
    """Mean of one score of one system, and its difference to the first system: None for the first system itself."""

    score: str
    system: str
    value: Resamples
    difference: Resamples | None


@dataclass(frozen=True)
class BlindPair:
    """Texts of one target by the systems `a` and `b`, in an order drawn at random."""

    prediction: Prediction
    a: str
    b: str
    text_a: str
    text_b: str


def read_systems(arguments: Sequence[str]) -> list[System]:
    """Read the predictions of systems, each given as `[NAME=]PLACE[,PLACE...]` with one place per seed.

    Raises:
        ValueError: A file is unreadable, or the systems differ in their targets or in their number of seeds.
    """
    systems: list[System] = []
    first: tuple[Predictions, Path] | None = None
    for argument in arguments:
        name, places = _parse(argument)
        files = [find_predictions(place) for place in places]
        seeds = [{item.id: item for item in read_predictions(file)} for file in files]
        first = first or (seeds[0], files[0])
        for found, file in zip(seeds, files, strict=True):
            _check_same_targets(found, file, *first)
        systems.append(System(_unique(name or _name_of(files[0]), systems), seeds))
    n_seeds = {system.name: len(system.seeds) for system in systems}
    if len(set(n_seeds.values())) > 1:
        given = ", ".join(f"{name}: {number}" for name, number in n_seeds.items())
        raise ValueError(f"the systems have different numbers of files ({given}): give the same seeds of each system")
    return systems


def find_predictions(place: Path) -> Path:
    """Return the file of predictions: `place` itself, or the one in the folder `place`.

    Raises:
        ValueError: The folder has no file of predictions, or several.
    """
    if not place.is_dir():
        return place
    if (place / FILE_NAME).exists():
        return place / FILE_NAME
    found = sorted(place.glob(f"*.{FILE_NAME}"))
    if len(found) != 1:
        there = f"several: {', '.join(file.name for file in found)}" if found else f"no {FILE_NAME}"
        raise ValueError(f"{place}: the folder has {there}; name the file")
    return found[0]


def _parse(argument: str) -> tuple[str, list[Path]]:
    """Split `[NAME=]PLACE[,PLACE...]`. The path of an existing file may contain both signs."""
    if os.path.exists(argument):
        return "", [Path(argument)]
    name, is_named, places = argument.partition("=")
    if not is_named or "/" in name:
        name, places = "", argument
    # os.path: Path.exists raises an error if many names together are longer than a file name can be
    parts = [places] if os.path.exists(places) else places.split(",")
    if not all(parts):
        raise ValueError(f"{argument}: a comma joins two files, so a file must stand before and behind it")
    return name, [Path(part) for part in parts]


def _unique(name: str, systems: Sequence[System]) -> str:
    names = {system.name for system in systems}
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return name if name not in names else next(other for other in numbered if other not in names)


def _name_of(file: Path) -> str:
    if file.name == FILE_NAME:
        return file.absolute().parent.name
    return file.name.removesuffix(".jsonl").removesuffix(".predictions")


def _check_same_targets(found: Predictions, file: Path, expected: Predictions, first: Path) -> None:
    for own, lacks, other, has in ((found, file, expected, first), (expected, first, found, file)):
        missing = [id for id in other if id not in own]
        if missing:
            more = f" and {len(missing) - N_NAMED} more" if missing[N_NAMED:] else ""
            raise ValueError(f"{lacks}: no predictions for {', '.join(missing[:N_NAMED])}{more}, which {has} has")
    for id, prediction in found.items():
        if prediction.targets != expected[id].targets:
            raise ValueError(f"{file}: the target of {id} differs from the one in {first}")
        if prediction.document != expected[id].document:
            raise ValueError(
                f"{file}: the document of {id} is {prediction.document!r}, but {expected[id].document!r} in {first}; "
                "write both files with the same version of evaluate.py"
            )


def compare_scores(systems: Sequence[System]) -> list[ScoreRow]:
    """Compare each score that all systems have, on the texts for which it is defined in all files.

    Differences are to the first system, paired by text and seed.
    """
    ids, documents = _texts(systems)
    rows = []
    for score in common_scores(systems):
        values_KSX = np.array([system.scores(score, ids) for system in systems])
        values_KSX[:, :, np.isnan(values_KSX).any(axis=(0, 1))] = np.nan
        if np.isnan(values_KSX).all():
            continue
        means = [resample(*by_document(values_SX, documents)) for values_SX in values_KSX]
        for system, mean in zip(systems, means, strict=True):
            rows.append(ScoreRow(score, system.name, mean, None if mean is means[0] else mean - means[0]))
    return rows


def common_scores(systems: Sequence[System]) -> list[str]:
    """Return the names of the scores that all lines of all files have."""
    first, *others = [item.scores for system in systems for seed in system.seeds for item in seed.values()]
    return [name for name in first if all(name in other for other in others)]


def _texts(systems: Sequence[System]) -> tuple[list[str], list[str]]:
    first = systems[0].seeds[0]
    return list(first), [prediction.document for prediction in first.values()]


def mean_by_text(systems: Sequence[System], score: str) -> dict[str, np.ndarray]:
    """Return each text's score of every system, the mean over seeds, by id.

    Raises:
        ValueError: A file lacks the score.
    """
    known = common_scores(systems)
    if score not in known:
        raise ValueError(f"--sort_by {score}: the files have the scores {', '.join(known)}")
    ids, _ = _texts(systems)
    means_KX = np.array([system.scores(score, ids).mean(axis=0) for system in systems])
    return dict(zip(ids, means_KX.T, strict=True))


def most_different_first(means: dict[str, np.ndarray]) -> list[str]:
    """Return the ids, ordered by the largest difference between two systems. Undefined scores come last."""
    spread = {id: float(np.ptp(values)) for id, values in means.items()}
    return sorted(spread, key=lambda id: 1.0 if math.isnan(spread[id]) else -spread[id])


def blind_pairs(systems: Sequence[System], n_pairs: int, seed: int) -> list[BlindPair]:
    """Draw pairs of different texts of two systems for the same target, in random order.

    The first seed of each system counts. With more than two systems, each pair of systems may be drawn.
    """
    draw, pairs = random.Random(seed), []
    for one, other in itertools.combinations(systems, 2):
        for id, prediction in one.seeds[0].items():
            texts = [(one.name, prediction.text), (other.name, other.seeds[0][id].text)]
            if texts[0][1] != texts[1][1]:
                (a, text_a), (b, text_b) = draw.sample(texts, 2)
                pairs.append(BlindPair(prediction, a, b, text_a, text_b))
    return draw.sample(pairs, min(n_pairs, len(pairs)))


def score_table(rows: Sequence[ScoreRow]) -> list[list[str]]:
    """Return the rows as text, after a row with the names of the columns."""
    has_seeds = any(row.value.means.shape[1] > 1 for row in rows)
    names = ["score", "system", "mean", "difference"] + ["over documents", "over seeds"] * has_seeds
    return [names, *(_cells(row, has_seeds) for row in rows)]


def _cells(row: ScoreRow, has_seeds: bool) -> list[str]:
    cells = [row.score, row.system, f"{row.value.interval().mean:.2f}"]
    if row.difference is None:
        return cells + [""] * (3 if has_seeds else 1)
    parts = [row.difference.interval()]
    parts += [row.difference.over_documents(), row.difference.over_seeds()] * has_seeds
    return cells + [f"{part:+.2f}" for part in parts]


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines of text with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def describe_comparison(systems: Sequence[System]) -> str:
    """Return a text about the number of texts and about the intervals."""
    ids, documents = _texts(systems)
    n_seeds = len(systems[0].seeds)
    text = f"{len(ids)} texts of {len(set(documents))} documents. Differences are to {systems[0].name}, paired by text"
    if n_seeds == 1:
        return f"{text}. Brackets hold 95 % intervals over documents (bootstrap)."
    return (
        f"{text} and by {n_seeds} seeds. Brackets hold 95 % intervals: over documents (bootstrap) and seeds "
        "(Student's t) together, then over each of them alone."
    )


def differences_to_first(means: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, list[float]]:
    """Return the differences of each further system's texts to the first system's, without undefined ones."""
    values_XK = np.array(list(means.values()))
    found_KX = (values_XK - values_XK[:, :1]).T[1:]
    return {name: own_X[~np.isnan(own_X)].tolist() for name, own_X in zip(names[1:], found_KX, strict=True)}
