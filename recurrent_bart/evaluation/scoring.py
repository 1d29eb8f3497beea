"""Scores of generated texts."""

from collections.abc import Sequence

from recurrent_bart.distributed import gather_objects, is_first, rank, world_size
from recurrent_bart.evaluation.bootstrap import Interval, intervals
from recurrent_bart.evaluation.evaluator import Evaluator, Sample
from recurrent_bart.evaluation.predictions import Prediction
from recurrent_bart.evaluation.rouge import rouge_per_sample

Scores = dict[str, float | None]


def score_samples(evaluator: Evaluator, samples: Sequence[Sample], with_source: bool = False) -> list[Prediction]:
    """Score generated texts. Each rank scores a part of the texts. All ranks return all predictions, in order.

    With `with_source`, the predictions of rank 0 have the source texts.
    """
    own = [score_text(sample.generated, [sample.target]) for sample in samples[rank() :: world_size()]]
    parts = gather_objects(own)
    scores = [parts[number % world_size()][number // world_size()] for number in range(len(samples))]
    has_source = with_source and is_first()
    return [_prediction(evaluator, *both, has_source) for both in zip(samples, scores, strict=True)]


def score_text(text: str, targets: Sequence[str]) -> Scores:
    """Return all scores of one text by name."""
    return {name: float(values[0]) for name, values in rouge_per_sample([text], targets).items()}


def _prediction(evaluator: Evaluator, sample: Sample, scores: Scores, has_source: bool) -> Prediction:
    row = evaluator.corpus[sample.document]
    return Prediction(
        id=sample.id,
        document=evaluator.names[sample.document],
        section=sample.section if evaluator.collator.task == "sections" else None,
        n_sections=len(row["sections"]),
        n_source_tokens=row["section_lengths"][sample.section],
        n_document_tokens=sum(row["section_lengths"]),
        targets=[sample.target],
        text=sample.generated,
        scores=scores,
        source=evaluator.source_text(sample.document, sample.section) if has_source else None,
    )


def mean_scores(predictions: Sequence[Prediction]) -> dict[str, Interval]:
    """Return the mean of each score over texts, with its 95 % interval over documents."""
    if not predictions:
        return {}
    scores = {name: [prediction.scores[name] for prediction in predictions] for name in predictions[0].scores}
    return intervals(scores, [prediction.document for prediction in predictions])
