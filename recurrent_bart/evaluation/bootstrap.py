"""95 % intervals of means: over documents by bootstrap, over seeds by Student's t.

Shape suffixes: S seeds, D documents, R resamples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

N_RESAMPLES = 4000
# draws that are in memory together
N_TOGETHER = 100
# of two-sided 95 % intervals
UPPER = 0.975
# points of the numerical integral below; its error is below 1e-5 for any degrees of freedom
N_POINTS = 20_001


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: The mean.
        low: Lower end; None where there is only one document.
        high: Upper end; None where there is only one document.
    """

    mean: float
    low: float | None
    high: float | None

    def __format__(self, spec: str) -> str:
        """Return `mean [low, high]`, each in the format of a number."""
        if self.low is None or self.high is None:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Resamples:
    """Means of one model, or differences of means of two models, on resampled documents.

    Subtract the `Resamples` of two models with the same seeds and documents to compare the models in pairs: both have
    drawn the same documents, because the draws depend on the number of documents alone.

    Attributes:
        means: Mean of each seed, `(1 + R, S)`. The first row is from the documents as they are.
        n_documents: Number of documents that were drawn from.
    """

    means: np.ndarray
    n_documents: int

    def __sub__(self, other: "Resamples") -> "Resamples":
        return Resamples(self.means - other.means, self.n_documents)

    def of_seed(self, seed: int) -> "Resamples":
        """Return the part of one seed, by its place on the seed axis."""
        return Resamples(self.means[:, [seed]], self.n_documents)

    def over_documents(self) -> Interval:
        """Return the interval that other documents would vary in, with these seeds.

        It is a percentile bootstrap. The percentiles lie further out for few documents (Hesterberg 2015,
        arXiv 1411.5279, "expanded percentile"): a plain percentile bootstrap of ten documents covers 90 %, not 95 %.
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
        """Return the interval that other seeds would vary in, on these documents.

        The seed is the unit: Student's t with S - 1 degrees of freedom on the means of the seeds. For a difference of
        two models this is the paired t interval.
        """
        means_S = self.means[0]
        mean, n = float(means_S.mean()), len(means_S)
        if n < 2:
            return Interval(mean, None, None)
        half = student_t(n - 1) * float(means_S.std(ddof=1)) / math.sqrt(n)
        return Interval(mean, mean - half, mean + half)

    def interval(self) -> Interval:
        """Return the interval that other documents and other seeds would vary in together.

        The distances from the mean to the ends of both intervals are added in squares (Zou and Donner 2008,
        Statistics in Medicine 27). So it is never narrower than either. With one seed it is over documents alone.
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
    """Draw documents with replacement and return the mean of each seed, total per count, on each draw.

    Args:
        totals_SD: Total of each document with each seed, such as the loss summed over its target tokens.
        counts_SD: Number of items in each total, such as target tokens; 0 where the document has none.
    """
    is_counted_D = counts_SD.any(axis=0)
    totals_DS, counts_DS = totals_SD[:, is_counted_D].T, counts_SD[:, is_counted_D].T
    n = len(totals_DS)
    draws = [(drawn_RD @ totals_DS) / (drawn_RD @ counts_DS) for drawn_RD in _draws(n)]
    return Resamples(np.vstack([totals_DS.sum(axis=0) / counts_DS.sum(axis=0), *draws]), n)


def _draws(n: int) -> Iterator[np.ndarray]:
    """Yield how often each of n documents is drawn when n are, some draws at a time."""
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
