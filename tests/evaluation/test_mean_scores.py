"""Scores are averaged over all texts, by the length of documents, and by the position of sections."""

from dataclasses import replace

import pytest

from recurrent_bart.evaluation.mean_scores import (
    by_document_length,
    by_section_position,
    mean_scores,
    mean_shares_by_tenth,
)
from recurrent_bart.evaluation.predictions import Prediction

PREDICTION = Prediction("", "", None, 1, 1, 1, [""], "", {}, {"text": None, "target": None})


def predict(document, score, **changes):
    return replace(PREDICTION, document=document, scores={"rouge1": score}, **changes)


def scored(n_documents, n_sections):
    """Score documents whose sections are all equal; document n scores 5 n."""
    documents = range(n_documents)
    return mean_scores([predict(str(n), 5.0 * n) for n in documents for _ in range(n_sections)])["rouge1"]


def test_intervals_of_sections_resample_documents():
    """Copies of a document's sections carry no new information, so the interval must not become narrower."""
    once, six_times = scored(15, n_sections=1), scored(15, n_sections=6)
    assert (six_times.low, six_times.mean, six_times.high) == pytest.approx((once.low, once.mean, once.high))
    # Computed by hand: the standard deviation of 0 to 14 is 4.472, Student's t is 2.145, and a step is 5 %.
    assert once.high - once.low == pytest.approx(2 * 2.145 * 5 * 4.472 / 15**0.5, rel=0.04)


def test_one_document_with_many_sections_has_no_interval():
    found = scored(n_documents=1, n_sections=6)
    assert (found.low, found.mean, found.high) == (None, 0.0, None)


def test_no_texts_have_no_scores():
    assert mean_scores([]) == {}


def test_quarters_of_the_documents_by_length():
    lengths = [700, 100, 300, 200, 600, 400, 500, 1800, 900]
    predictions = [predict(f"d{n}", float(n), n_document_tokens=n) for n in lengths]
    # A second section of the shortest document.
    predictions.append(predict("d100", 400.0, n_document_tokens=100))
    groups = by_document_length(predictions)
    assert [(group.name, group.n_documents, group.n_texts) for group in groups] == [
        ("documents of 100 to 200 tokens", 2, 3),
        ("documents of 300 to 400 tokens", 2, 2),
        ("documents of 500 to 600 tokens", 2, 2),
        ("documents of 700 to 1,800 tokens", 3, 3),
    ]
    means = [group.scores["rouge1"].mean for group in groups]
    assert means == pytest.approx([700 / 3, 350, 550, 3400 / 3])


def test_texts_of_one_record_are_in_the_quarters_of_their_own_lengths():
    predictions = [predict("a", float(n), n_document_tokens=n) for n in (400, 100, 300, 200)]
    groups = by_document_length(predictions)
    assert [(group.name, group.n_documents) for group in groups] == [
        (f"documents of {n} to {n} tokens", 1) for n in (100, 200, 300, 400)
    ]
    assert [group.scores["rouge1"].mean for group in groups] == [100, 200, 300, 400]


def test_three_documents_have_no_quarters():
    assert by_document_length([predict(str(n), 0.0) for n in range(3)]) == []


def test_sections_are_grouped_by_their_quarter_of_the_document():
    """Document a has 8 sections, document b has 3: its second section is in the second quarter."""
    predictions = [predict("a", float(n), section=n, n_sections=8) for n in range(8)]
    predictions += [predict("b", 10.0 + n, section=n, n_sections=3) for n in range(3)]
    groups = by_section_position(predictions)
    assert [group.name for group in groups] == [f"quarter {number} of the sections" for number in (1, 2, 3, 4)]
    assert [group.n_texts for group in groups] == [3, 3, 3, 2]
    means = [group.scores["rouge1"].mean for group in groups]
    assert means == pytest.approx([11 / 3, 16 / 3, 21 / 3, 13 / 2])


def test_documents_with_one_target_have_no_positions():
    assert by_section_position([predict("a", 1.0)]) == []


def test_shares_by_tenth_are_averaged_over_texts_that_have_them():
    first, second = [10.0] + [0.0] * 9, [30.0] + [2.0] * 9
    shares = [{"text": first, "target": None}, {"text": second, "target": None}, {"text": None, "target": None}]
    found = mean_shares_by_tenth([predict(str(n), 0.0, shares_by_tenth=own) for n, own in enumerate(shares)])
    assert list(found) == ["text"]
    assert [share.mean for share in found["text"]] == [20.0] + [1.0] * 9
