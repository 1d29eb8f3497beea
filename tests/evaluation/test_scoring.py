"""Texts are scored against their targets, and means have intervals over documents."""

from dataclasses import replace

import pytest

from evaluated_documents import document_rows, make_evaluator, section_rows
from processes import run_in_processes
from recurrent_bart.evaluation.evaluator import Sample
from recurrent_bart.evaluation.predictions import Prediction
from recurrent_bart.evaluation.scoring import mean_scores, score_samples


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
        evaluator, [sample_of(evaluator, "a[1]", 0, 2), sample_of(evaluator, "c[0]", 2, 1)], with_source=True
    )
    assert (prediction.id, prediction.document, prediction.section, prediction.n_sections) == ("a[1]", "a", 2, 3)
    assert (prediction.n_source_tokens, prediction.n_document_tokens) == (5, 17)
    assert prediction.source == " ".join(map(str, evaluator.corpus[0]["sections"][2]))
    assert prediction.scores["rouge1"] == pytest.approx(100)


def test_the_mean_is_over_all_texts():
    evaluator = make_evaluator(document_rows())
    samples = [sample_of(evaluator, "d1", 1), sample_of(evaluator, "d3", 3, text="nothing")]
    found = mean_scores(score_samples(evaluator, samples))
    assert found["rouge1"].mean == found["rougeLsum"].mean == pytest.approx(50)
    assert mean_scores([]) == {}


def scored(n_documents, n_sections):
    """Score documents whose sections are all equal; document n scores 5 n."""
    prediction = Prediction("", "", 0, 1, 1, 1, [""], "", {})
    return mean_scores(
        [
            replace(prediction, document=str(document), scores={"rouge1": 5.0 * document})
            for document in range(n_documents)
            for _ in range(n_sections)
        ]
    )


def test_intervals_of_sections_resample_documents():
    """Copies of a document's sections carry no new information, so the interval must not become narrower."""
    once, six_times = scored(15, n_sections=1)["rouge1"], scored(15, n_sections=6)["rouge1"]
    assert (six_times.low, six_times.mean, six_times.high) == pytest.approx((once.low, once.mean, once.high))
    # Computed by hand: the standard deviation of 0 to 14 is 4.472, Student's t is 2.145, and a step is 5 %.
    assert once.high - once.low == pytest.approx(2 * 2.145 * 5 * 4.472 / 15**0.5, rel=0.04)


def test_one_document_with_many_sections_has_no_interval():
    found = scored(n_documents=1, n_sections=6)["rouge1"]
    assert (found.low, found.mean, found.high) == (None, 0.0, None)


@pytest.mark.distributed
def test_two_ranks_give_the_scores_of_one(tmp_path):
    """The number of texts is odd, so rank 0 scores one text more."""
    evaluator = make_evaluator(document_rows())
    samples = [sample_of(evaluator, f"d{number}", number) for number in range(5)]
    alone = score_samples(evaluator, samples)

    def score(rank):
        return score_samples(evaluator, samples)

    assert run_in_processes(score, 2, tmp_path) == [alone, alone]
