"""Texts are scored against their targets and their sources."""

import pytest

from evaluated_documents import document_rows, make_evaluator, make_row, section_rows
from processes import run_in_processes
from recurrent_bart.evaluation.evaluator import Sample
from recurrent_bart.evaluation.mean_scores import by_section_position, mean_scores
from recurrent_bart.evaluation.scoring import score_samples, score_text
from recurrent_bart.monitoring.fields import SCORES


def sample_of(evaluator, name, document, section=0, text=None):
    target = evaluator.corpus[document]["summary_texts"][section]
    return Sample(name, "", target, target if text is None else text, document, section)


def test_a_prediction_describes_its_document():
    evaluator = make_evaluator(document_rows())
    (prediction,) = score_samples(evaluator, [sample_of(evaluator, "d1", 1, text="nothing")])
    target = evaluator.corpus[1]["summary_texts"][0]
    assert (prediction.id, prediction.document, prediction.section) == ("d1", "d1", None)
    assert (prediction.n_sections, prediction.n_source_tokens, prediction.n_document_tokens) == (1, 4, 4)
    assert (prediction.targets, prediction.text, prediction.source) == ([target], "nothing", None)
    assert prediction.scores["rouge1"] == 0


def test_a_prediction_of_a_section_describes_the_section():
    evaluator = make_evaluator(section_rows(), "sections")
    prediction, _ = score_samples(
        evaluator, [sample_of(evaluator, "a[2]", 0, 2), sample_of(evaluator, "c[1]", 2, 1)], with_source=True
    )
    assert (prediction.id, prediction.document, prediction.section, prediction.n_sections) == ("a[2]", "a", 2, 3)
    assert (prediction.n_source_tokens, prediction.n_document_tokens) == (5, 17)
    assert prediction.source == " ".join(map(str, evaluator.corpus[0]["sections"][2]))
    assert prediction.scores["rouge1"] == pytest.approx(100)


def test_a_prediction_has_the_position_of_its_section_in_the_record():
    """The record has 10 sections, and only its last two have a summary: quarter 4, not 2 and 3."""
    row = make_row("a", [8, 1, 1], [0, 2, 3]) | {"section_indices": [0, 8, 9], "n_sections": 10}
    evaluator = make_evaluator([row], "sections")
    samples = [sample_of(evaluator, f"a[{section}]", 0, section) for section in (1, 2)]
    predictions = score_samples(evaluator, samples)
    assert [(prediction.section, prediction.n_sections) for prediction in predictions] == [(8, 10), (9, 10)]
    assert [group.name for group in by_section_position(predictions)] == ["quarter 4 of the sections"]


def test_the_answers_about_one_text_have_the_interval_of_the_texts():
    """Answers about one text have the same score, so a second answer per text carries no new information."""
    rows = [make_row(f"m{n}", [9], [4]) for n in range(8)]
    asked = [row | {"id": f"{row['id']} (query {n})"} for row in rows for n in range(1, 6)]
    found = []
    for own in (rows, asked):
        evaluator, n_same = make_evaluator(own), len(own) // len(rows)
        words = [" ".join(row["summary_texts"][0].split()[: 1 + index // n_same % 4]) for index, row in enumerate(own)]
        samples = [sample_of(evaluator, row["id"], index, text=words[index]) for index, row in enumerate(own)]
        predictions = score_samples(evaluator, samples)
        assert [prediction.id for prediction in predictions] == [row["id"] for row in own]
        found.append(mean_scores(predictions)["rouge1"])
    once, five_times = found
    assert (five_times.low, five_times.mean, five_times.high) == pytest.approx((once.low, once.mean, once.high))
    assert once.low < once.mean


def test_every_score_is_described():
    scores = score_text("a text", ["a target"], "a source")["scores"]
    assert scores.keys() == SCORES.keys()


def test_the_source_of_a_section_is_the_section():
    evaluator = make_evaluator(section_rows(), "sections")
    section, earlier = (evaluator.corpus[0]["sections"][number] for number in (2, 0))
    copied, foreign = (" ".join(map(str, ids)) for ids in (section, earlier))
    samples = [sample_of(evaluator, "a[2]", 0, 2, text) for text in (copied, foreign)]
    first, second = score_samples(evaluator, samples)
    assert (first.scores["coverage"], first.scores["density"]) == (100, 5)
    assert first.shares_by_tenth["text"] == pytest.approx([25, 0, 25, 0, 0, 25, 0, 25, 0, 0])
    assert second.scores["novel_2grams"] == 100


def test_the_best_of_several_references_counts():
    rows = document_rows()
    rows[1]["reference_texts"] = [["one two three", "four five"]]
    evaluator = make_evaluator(rows)
    target = rows[1]["summary_texts"][0]
    (prediction,) = score_samples(evaluator, [sample_of(evaluator, "d1", 1, text="one two")])
    assert prediction.targets == [target, "one two three", "four five"]
    # Of 2 and 3 words, 2 are common.
    assert prediction.scores["rouge1"] == pytest.approx(100 * 2 * 2 / 5)
    assert prediction.scores["n_target_words"] == pytest.approx((9 + 3 + 2) / 3)


@pytest.mark.distributed
def test_two_ranks_give_the_scores_of_one(tmp_path):
    """The number of texts is odd, so rank 0 scores one text more."""
    evaluator = make_evaluator(document_rows())
    samples = [sample_of(evaluator, f"d{number}", number) for number in range(5)]
    alone = score_samples(evaluator, samples)

    def score(rank):
        return score_samples(evaluator, samples)

    assert run_in_processes(score, 2, tmp_path) == [alone, alone]
