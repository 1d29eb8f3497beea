"""Scores of generated texts, computed on all ranks."""

from collections.abc import Sequence
from typing import Any

from recurrent_bart.data.word_segmenter import WordSegmenter, segmenter_of
from recurrent_bart.data.words import words
from recurrent_bart.distributed import gather_objects, is_first, rank, world_size
from recurrent_bart.evaluation.evaluator import Evaluator, Sample
from recurrent_bart.evaluation.measures import Source, measure, shares_by_tenth
from recurrent_bart.evaluation.model_scores import Scorer
from recurrent_bart.evaluation.predictions import Prediction
from recurrent_bart.evaluation.rouge import remember_words, rouge_per_sample


def score_samples(
    evaluator: Evaluator,
    samples: Sequence[Sample],
    scorers: Sequence[Scorer] = (),
    with_source: bool = False,
    segmenter: str | None = None,
) -> list[Prediction]:
    """Score generated texts. Each rank scores a part of the texts. All ranks return all predictions, in order.

    `scorers` add scores by models. With `with_source`, the predictions of rank 0 have the source texts.
    `segmenter` cuts Japanese texts into words for further ROUGE scores; None: the segmenter of the tokenizer.
    """
    name, mine = segmenter or segmenter_of(evaluator.tokenizer), samples[rank() :: world_size()]
    words_of: str | WordSegmenter = name
    if name != "none":
        words_of = WordSegmenter(name)
        remember_words(words_of, [text for it in mine for text in (it.generated, *_targets(evaluator, it))])
    own = [_score(evaluator, sample, scorers, words_of) for sample in mine]
    parts = gather_objects(own)
    scores = [parts[number % world_size()][number // world_size()] for number in range(len(samples))]
    has_source = with_source and is_first()
    return [_prediction(evaluator, *both, has_source) for both in zip(samples, scores, strict=True)]


def score_text(
    text: str, targets: Sequence[str], source: str, segmenter: str | WordSegmenter = "none"
) -> dict[str, Any]:
    """Return the fields `scores` and `shares_by_tenth` of a prediction."""
    rouge = {name: float(values[0]) for name, values in rouge_per_sample([text], [targets], segmenter).items()}
    in_words = words(text), [words(target) for target in targets], Source(words(source))
    return {"scores": rouge | measure(*in_words), "shares_by_tenth": shares_by_tenth(*in_words)}


def _score(
    evaluator: Evaluator, sample: Sample, scorers: Sequence[Scorer], segmenter: str | WordSegmenter
) -> dict[str, Any]:
    inputs = sample.generated, _targets(evaluator, sample), evaluator.source_text(sample.document, sample.section)
    found = score_text(*inputs, segmenter)
    for scorer in scorers:
        found["scores"] |= scorer(*inputs)
    return found


def _targets(evaluator: Evaluator, sample: Sample) -> list[str]:
    references = evaluator.corpus[sample.document]["reference_texts"]
    return [sample.target, *references[sample.section]]


def _prediction(evaluator: Evaluator, sample: Sample, scores: dict[str, Any], has_source: bool) -> Prediction:
    row = evaluator.corpus[sample.document]
    return Prediction(
        id=sample.id,
        document=evaluator.documents[sample.document],
        section=row["section_indices"][sample.section] if evaluator.collator.task == "sections" else None,
        n_sections=row["n_sections"],
        n_source_tokens=row["section_lengths"][sample.section],
        n_document_tokens=sum(row["section_lengths"]),
        targets=_targets(evaluator, sample),
        text=sample.generated,
        source=evaluator.source_text(sample.document, sample.section) if has_source else None,
        query=evaluator.query_text(sample.document) or None,
        **scores,
    )
