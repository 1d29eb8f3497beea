"""95 % confidence intervals of means: over documents by bootstrap, over seeds by Student's t.

Shape suffixes: S seeds, X texts, D documents, R resamples.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

N_RESAMPLES = 4000
# Number of resamples held in memory at a time.
N_TOGETHER = 100
# Upper quantile of a two-sided 95 % interval.
UPPER = 0.975
# Points of the numerical integral in `student_t`; its error is below 1e-5 for any degrees of freedom.
N_POINTS = 20_001


@dataclass(frozen=True)
class Interval:
    """Mean with its 95 % confidence interval. Its ends `low` and `high` are None if there is only one document."""

    mean: float
    low: float | None
    high: float | None

    def __format__(self, spec: str) -> str:
        """Return `mean [low, high]`, each number in the format `spec`."""
        if self.low is None or self.high is None:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Resamples:
    """Means of one model, or differences of the means of two models, on resampled documents.

    For a paired comparison, subtract the `Resamples` of two models with equal seeds and documents. Both models use the
    same draws, because the draws depend only on the number of documents.

    Attributes:
        means: Mean of each seed, `(1 + R, S)`. Row 0 is the mean over the original documents.
        n_documents: Number of documents that were resampled.
    """

    means: np.ndarray
    n_documents: int

    def __sub__(self, other: "Resamples") -> "Resamples":
        return Resamples(self.means - other.means, self.n_documents)

    def of_seed(self, seed: int) -> "Resamples":
        """Return the resamples of one seed; `seed` is its index on the seed axis."""
        return Resamples(self.means[:, [seed]], self.n_documents)

    def over_documents(self) -> Interval:
        """Return the confidence interval over documents, with the seeds fixed.

        The method is the expanded percentile bootstrap (Hesterberg 2015, arXiv 1411.5279), whose percentiles lie
        further out for few documents. A plain percentile bootstrap of ten documents covers 90 %, not 95 %.
        """
        means_R = self.means.mean(axis=1)
        mean = float(means_R[0])
        if self.n_documents < 2:
            return Interval(mean, None, None)
        n = self.n_documents
        lower = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t(n - 1))
        low, high = np.quantile(means_R[1:], (lower, 1 - lower))
        return Interval(mean, float(low), float(high))

    def over_seeds(self) -> Interval:
        """Return the Student's t interval over seeds. For a difference of two models, this is the paired t interval."""
        means_S = self.means[0]
        mean, n = float(means_S.mean()), len(means_S)
        if n < 2:
            return Interval(mean, None, None)
        half = student_t(n - 1) * float(means_S.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half)

    def interval(self) -> Interval:
        """Return the confidence interval over documents and seeds together.

        With one seed, it is the interval over documents alone.

        Squared distances from the mean to the ends of `over_documents` and `over_seeds` add up (Zou and Donner 2008,
        Statistics in Medicine 27), so the result is never narrower than these two intervals.
        """
        documents, seeds = self.over_documents(), self.over_seeds()
        if documents.low is None or documents.high is None:
            return documents
        if seeds.low is None or seeds.high is None:
            return documents
        mean = documents.mean
        below = math.hypot(mean - documents.low, mean - seeds.low)
        above = math.hypot(documents.high - mean, seeds.high - mean)
        return Interval(mean, mean - below, mean + above)


def resample(totals_SD: np.ndarray, counts_SD: np.ndarray) -> Resamples:
    """Draw documents with replacement. Return the mean (total over count) of each seed on each draw.

    Args:
        totals_SD: Total of each document with each seed, for example the loss summed over target tokens.
        counts_SD: Number of items in each total, for example target tokens; 0 drops the document.
    """
    is_counted_D = counts_SD.any(axis=0)
    totals_DS, counts_DS = totals_SD[:, is_counted_D].T, counts_SD[:, is_counted_D].T
    n = len(totals_DS)
    draws = [(drawn_RD @ totals_DS) / (drawn_RD @ counts_DS) for drawn_RD in _draws(n)]
    return Resamples(np.vstack([totals_DS.sum(axis=0) / counts_DS.sum(axis=0), *draws]), n)


def by_document(values_SX: np.ndarray, documents: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's total and number of values, `(S, D)`, for `resample`. NaN is not counted.

    `documents` gives the document of each text. The documents are in order of their first text.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    document_X = np.array([numbers[name] for name in documents])
    is_counted_SX = ~np.isnan(values_SX)
    totals_SD, counts_SD = np.zeros((2, len(values_SX), len(numbers)))
    for seed, is_counted_X in enumerate(is_counted_SX):
        counted_X = document_X[is_counted_X]
        totals_SD[seed] = np.bincount(counted_X, values_SX[seed, is_counted_X], minlength=len(numbers))
        counts_SD[seed] = np.bincount(counted_X, minlength=len(numbers))
    return totals_SD, counts_SD


def intervals(
    scores: Mapping[str, Sequence[float | None] | np.ndarray], documents: Sequence[Hashable]
) -> dict[str, Interval]:
    """Return the mean of each score over texts, with its 95 % interval over documents.

    The texts of one document are resampled together. None and NaN are not counted. A score without values is left out.
    """
    # M scores stand in place of S seeds, so that one set of draws serves all scores of the same documents.
    totals_MD, counts_MD = by_document(np.array(list(scores.values()), dtype=float), documents)
    numbers_of: dict[bytes, list[int]] = {}
    for number, counts_D in enumerate(counts_MD):
        if counts_D.any():
            numbers_of.setdefault((counts_D > 0).tobytes(), []).append(number)
    found: dict[int, Interval] = {}
    for numbers in numbers_of.values():
        resamples = resample(totals_MD[numbers], counts_MD[numbers])
        found |= {number: resamples.of_seed(row).interval() for row, number in enumerate(numbers)}
    return {name: found[number] for number, name in enumerate(scores) if number in found}


def _draws(n: int) -> Iterator[np.ndarray]:
    """Yield the number of times that each of n documents is drawn, `(N_TOGETHER, n)`, for all resamples."""
    generator = np.random.default_rng(0)
    first_of_draw_R1 = n * np.arange(N_TOGETHER)[:, None]
    for _ in range(0, N_RESAMPLES, N_TOGETHER):
        drawn_RD = generator.integers(n, size=(N_TOGETHER, n)) + first_of_draw_R1
        yield np.bincount(drawn_RD.ravel(), minlength=N_TOGETHER * n).reshape(N_TOGETHER, n).astype(float)


@lru_cache
def student_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    With `x = sqrt(degrees) * tan(angle)`, the density of the angle is proportional to `cos(angle) ** (degrees - 1)`.
    """
    angles = np.linspace(0, math.pi / 2, N_POINTS)
    density = np.cos(angles) ** (degrees - 1)
    areas = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(2 * UPPER - 1, areas / areas[-1], angles)
    return math.sqrt(degrees) * math.tan(angle)
