"""Metrics by which the best model is chosen."""

import math

import pytest

from recurrent_bart.evaluation import rouge
from recurrent_bart.monitoring.best_metric import ROUGE, best_evaluation, is_better


def test_every_rouge_of_evaluations_can_choose():
    assert ROUGE == rouge.METRICS


@pytest.mark.parametrize(
    ("metric", "value", "best", "expected"),
    [
        ("loss", 2.0, 3.0, True),
        ("loss", 3.0, 3.0, False),
        ("loss", 4.0, 3.0, False),
        ("loss", math.nan, 3.0, False),
        ("loss", math.inf, None, False),
        ("rouge1", 4.0, 3.0, True),
        ("rouge1", 3.0, 3.0, False),
        ("rouge1", 2.0, 3.0, False),
        ("rouge1", 0.0, None, True),
        ("rouge1", None, None, False),
    ],
)
def test_a_loss_is_better_if_low_and_rouge_if_high(metric, value, best, expected):
    assert is_better(metric, value, best) is expected


def test_the_best_evaluation_is_the_first_of_the_best():
    records = [{"step": 0, "validation_loss": 3.0}, {"step": 1, "loss": 1.0}]
    records += [
        {"step": step, "validation_loss": 2.0, "rougeL": value} for step, value in ((2, 7.0), (3, 9.0), (4, 9.0))
    ]
    assert best_evaluation(records, "loss")["step"] == 2
    assert best_evaluation(records, "rougeL")["step"] == 3
    assert best_evaluation([], "loss") == {}
