"""Metrics by which a run chooses its best model, and their directions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# values of --metric_for_best_model
BEST_METRICS = ("loss", *ROUGE)


def logged_value(record: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric of an evaluation's record in metrics.jsonl, or None if the evaluation did not compute it."""
    return record.get("validation_loss" if metric == "loss" else metric)


def is_better(metric: str, value: float | None, best: float | None) -> bool:
    """Return True if `value` is finite and better than `best`. A low loss is good, and a high ROUGE."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best if metric == "loss" else value > best)


def best_evaluation(records: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return the record with the best value of a metric, the first of equals; empty if no record has the metric."""
    best: dict[str, Any] = {}
    for record in records:
        if is_better(metric, logged_value(record, metric), logged_value(best, metric)):
            best = record
    return best


def describe_best(metric: str, value: float) -> str:
    """Return the value of the best model, for example "validation loss 3.0000, the lowest"."""
    return f"validation loss {value:.4f}, the lowest" if metric == "loss" else f"{metric} {value:.2f}, the highest"
