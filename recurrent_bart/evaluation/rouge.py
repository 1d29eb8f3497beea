"""ROUGE of summaries (Lin 2004), computed by the rouge-score package."""

from collections.abc import Hashable, Sequence

import numpy as np
from rouge_score import rouge_scorer, tokenizers

from recurrent_bart.data.words import sentences, words
from recurrent_bart.evaluation.bootstrap import Interval, resample

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeTokenizer(tokenizers.Tokenizer):
    """Tokenizer that is identical to rouge-score's on ASCII text and keeps the words of all other scripts.

    Words are normalised, so that all Unicode forms of a text have the same words.
    """

    def __init__(self) -> None:
        self.ascii = tokenizers.DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text; ASCII words are stemmed."""
        if text.isascii():
            return self.ascii.tokenize(text)
        tokens: list[str] = []
        for word in words(text):
            tokens += self.ascii.tokenize(word) if word.isascii() else [word]
        return tokens


def rouge(
    predictions: Sequence[str], references: Sequence[str], documents: Sequence[Hashable] | None = None
) -> dict[str, Interval]:
    """Return the mean of `rouge_per_sample` over all texts, with its 95 % interval over documents.

    `documents` gives the document of each text; the texts of one document are resampled together. If it is None, each
    text is a separate document.
    """
    scores = rouge_per_sample(predictions, references)
    names = range(len(references)) if documents is None else documents
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    totals_MD, counts_MD = np.zeros((2, len(METRICS), len(numbers)))
    for name, *values in zip(names, *scores.values(), strict=True):
        totals_MD[:, numbers[name]] += values
        counts_MD[:, numbers[name]] += 1
    # M metrics stand in place of S seeds, so all metrics use the same draws of D documents.
    resamples = resample(totals_MD, counts_MD)
    return {metric: resamples.of_seed(number).interval() for number, metric in enumerate(METRICS)}


def rouge_per_sample(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return ROUGE-1, -2, -L (whole text) and -Lsum (by sentence) of each text: F-measures in percent.

    Raises:
        ValueError: There are no references, or the numbers of predictions and references differ.
    """
    if not references:
        raise ValueError("ROUGE needs at least one reference text")
    scorer = rouge_scorer.RougeScorer(list(METRICS), tokenizer=RougeTokenizer())
    scores = [
        scorer.score("\n".join(sentences(reference)), "\n".join(sentences(prediction)))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([100.0 * score[name].fmeasure for score in scores]) for name in METRICS}
