"""Measures of a text: repetition, novelty, copying, length, and the parts of the source that its words come from.

All measures compare the words of `recurrent_bart.data.words`: normalised, without stemming, in any script. A share is
in percent. A measure without any n-gram to count is None.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

Words = Sequence[str]

REPEATED = 4
NOVEL = (1, 2, 4)
N_PARTS = 10


def ngrams(text: Words, n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a text in order."""
    return list(zip(*(text[start:] for start in range(n)), strict=False))


class Source:
    """Words of a source, whose n-grams are indexed once for all texts that are compared with it."""

    def __init__(self, words: Words):
        self.words = words
        # Positions of each bigram.
        self.positions: dict[tuple[str, ...], list[int]] = {}
        for position, pair in enumerate(ngrams(words, 2)):
            self.positions.setdefault(pair, []).append(position)
        self._ngrams: dict[int, set[tuple[str, ...]]] = {}

    def ngrams(self, n: int) -> set[tuple[str, ...]]:
        """Return the distinct n-grams."""
        if n not in self._ngrams:
            self._ngrams[n] = set(ngrams(self.words, n))
        return self._ngrams[n]


def repeated_share(text: Words, n: int = REPEATED) -> float | None:
    """Return the share of n-grams that repeat an earlier n-gram of the text: 1 - distinct / total."""
    found = ngrams(text, n)
    return 100 * (1 - len(set(found)) / len(found)) if found else None


def novel_share(text: Words, source: Source, n: int) -> float | None:
    """Return the share of the text's n-grams that are not in the source."""
    found, known = ngrams(text, n), source.ngrams(n)
    return 100 * sum(ngram not in known for ngram in found) / len(found) if found else None


def fragment_lengths(text: Words, source: Source) -> list[int]:
    """Return the lengths of the extractive fragments of a text (Grusky et al., NAACL 2018), in words.

    From the first word on, each fragment is the longest run of words that is also in the source. Words that are not in
    the source belong to no fragment.
    """
    known, words = source.ngrams(1), source.words
    lengths, start = [], 0
    while start < len(text):
        positions = source.positions.get(tuple(text[start : start + 2]), [])
        length = 2 if positions else int((text[start],) in known)
        while positions and start + length < len(text):
            word = text[start + length]
            positions = [at for at in positions if at + length < len(words) and words[at + length] == word]
            length += bool(positions)
        lengths += [length] if length else []
        start += max(1, length)
    return lengths


def coverage_and_density(text: Words, source: Source) -> tuple[float | None, float | None]:
    """Return coverage and density of the extractive fragments (Grusky et al., NAACL 2018).

    Coverage is the share of the text's words in fragments. Density is the mean, over the text's words, of the length of
    the word's fragment.
    """
    if not text:
        return None, None
    lengths = fragment_lengths(text, source)
    return 100 * sum(lengths) / len(text), sum(length**2 for length in lengths) / len(text)


def shares_by_part(text: Words, source: Source, n_parts: int = N_PARTS) -> list[float] | None:
    """Return, for each of `n_parts` equal parts of the source, the share of the text's distinct bigrams found there.

    A bigram that stands at several places of the source counts at each place in equal fractions. So function words
    spread evenly, and the sum over the parts is the share of bigrams found at all.
    """
    wanted = set(ngrams(text, 2))
    if not wanted:
        return None
    shares, n_pairs = [0.0] * n_parts, len(source.words) - 1
    for pair in wanted:
        positions = source.positions.get(pair, [])
        for position in positions:
            shares[position * n_parts // n_pairs] += 100 / (len(positions) * len(wanted))
    return shares


def measure(text: Words, targets: Sequence[Words], source: Source) -> dict[str, float | None]:
    """Return the measures of a text by their names in `monitoring/fields.py`. Several targets count as their mean."""
    n_target_words = fmean(map(len, targets))
    coverage, density = coverage_and_density(text, source)
    return {
        f"repeated_{REPEATED}grams": repeated_share(text),
        f"target_repeated_{REPEATED}grams": _mean(map(repeated_share, targets)),
        **{f"novel_{n}grams": novel_share(text, source, n) for n in NOVEL},
        **{f"target_novel_{n}grams": _mean(novel_share(target, source, n) for target in targets) for n in NOVEL},
        "coverage": coverage,
        "density": density,
        "n_words": float(len(text)),
        "n_target_words": n_target_words,
        "length_ratio": len(text) / n_target_words if n_target_words else None,
    }


def shares_by_tenth(text: Words, targets: Sequence[Words], source: Source) -> dict[str, list[float] | None]:
    """Return `shares_by_part` of the text and of its targets' mean."""
    found = [shares for target in targets if (shares := shares_by_part(target, source)) is not None]
    mean = [fmean(part) for part in zip(*found, strict=True)] if found else None
    return {"text": shares_by_part(text, source), "target": mean}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
