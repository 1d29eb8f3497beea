"""95 % intervals by bootstrap over documents.

Shape suffixes: S seeds, D documents, R resamples.
"""

from dataclasses import dataclass

import numpy as np

N_RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def resampled_means(totals_SD: np.ndarray, counts_SD: np.ndarray) -> np.ndarray:
    """Mean over seeds of total per count, `(1 + R,)`: first as it is, then with documents and seeds drawn anew.

    What is drawn depends on the shape alone: between two models on the same documents, differences are paired.

    Args:
        totals_SD: Of each document with each seed, such as the loss summed over its targets.
        counts_SD: How many of them there are; 0 where the document has none.
    """
    is_counted_D = counts_SD.any(axis=0)
    totals_SD, counts_SD = totals_SD[:, is_counted_D], counts_SD[:, is_counted_D]
    n_seeds, n_documents = totals_SD.shape
    generator = np.random.default_rng(0)
    documents_RD, seeds_RS = (_times_drawn(generator, n) for n in (n_documents, n_seeds))
    ratios_RS = (documents_RD @ totals_SD.T) / (documents_RD @ counts_SD.T)
    return (ratios_RS * seeds_RS).sum(axis=1) / n_seeds


def interval(means_R: np.ndarray) -> Interval:
    """Of resampled means, or of differences between those of two models."""
    low, high = np.percentile(means_R[1:], (2.5, 97.5))
    return Interval(float(means_R[0]), float(low), float(high))


def _times_drawn(generator: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n is drawn when n are, `(1 + R, n)`; in the first row each once."""
    return np.vstack([np.ones(n), generator.multinomial(n, np.full(n, 1 / n), N_RESAMPLES)])
