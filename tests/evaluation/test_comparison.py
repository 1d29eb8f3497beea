"""Systems are compared on the same texts, and pairs for judges are drawn at random."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from recurrent_bart.evaluation.comparison import System, blind_pairs, compare_scores, most_different_first
from recurrent_bart.evaluation.predictions import Prediction

PREDICTION = Prediction("", "", None, 1, 1, 1, ["target"], "", {}, {"text": None, "target": None})


def system(name, *seeds):
    """Return a system from the scores of each seed; two texts belong to one document."""
    own = []
    for scores in seeds:
        texts = [
            replace(PREDICTION, id=str(n), document=f"d{n // 2}", text=f"{name} {n}", scores={"rouge1": value})
            for n, value in enumerate(scores)
        ]
        own.append({item.id: item for item in texts})
    return System(name, own)


def test_texts_of_one_document_are_resampled_together():
    """The documents gain 1 and 3."""
    _, row = compare_scores([system("a", [0.0] * 4), system("b", [2.0, 0.0, 3.0, 3.0])])
    found = row.difference.interval()
    assert (found.low, found.mean, found.high) == pytest.approx((1, 2, 3))


def test_a_text_without_a_score_in_one_file_counts_in_none():
    first = system("a", [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0])
    second = system("b", [1.0, None, 5.0, 5.0], [2.0, 8.0, 6.0, None])
    one, other = compare_scores([first, second])
    assert one.value.interval().mean == pytest.approx(1.5)
    assert other.difference.means[0].tolist() == pytest.approx([2.0, 2.0])


def test_texts_with_the_largest_difference_come_first():
    means = {"a": [1, 2, 0], "b": [9, 0, 5], "c": [np.nan, 0, 99], "d": [4, 4, 4]}
    assert most_different_first({id: np.array(own, dtype=float) for id, own in means.items()}) == ["b", "a", "d", "c"]


def test_blind_pairs_are_of_all_systems_in_both_orders():
    systems = [system(name, [0.0] * 100) for name in "abc"]
    pairs = blind_pairs(systems, 1000, seed=0)
    assert len(pairs) == 300
    assert {frozenset((pair.a, pair.b)) for pair in pairs} == {frozenset("ab"), frozenset("ac"), frozenset("bc")}
    firsts = Counter(pair.a < pair.b for pair in pairs)
    # A binomial with 300 draws lies within these limits with probability 0.9999.
    assert 115 < firsts[True] < 185
    assert all(pair.text_a == f"{pair.a} {pair.prediction.id}" for pair in pairs)
    assert all(pair.text_b == f"{pair.b} {pair.prediction.id}" for pair in pairs)
