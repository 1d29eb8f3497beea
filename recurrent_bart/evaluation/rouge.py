"""ROUGE of summaries (Lin 2004), by the rouge-score package."""

from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer, tokenizers

from recurrent_bart.data.words import SENTENCE_END, WORD
from recurrent_bart.evaluation.bootstrap import Interval, interval, resampled_means

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeTokenizer(tokenizers.Tokenizer):
    """Identical to rouge-score's tokenizer on ASCII; in other scripts, which that one drops, words or characters."""

    def __init__(self) -> None:
        self.ascii = tokenizers.DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Words of a text; in unspaced scripts each character is one."""
        if text.isascii():
            return self.ascii.tokenize(text)
        words: list[str] = []
        for word in WORD.findall(text.lower()):
            words += self.ascii.tokenize(word) if word.isascii() else [word]
        return words


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Interval]:
    """Mean over texts of `rouge_of_each`, with its 95 % interval."""
    scores = rouge_of_each(predictions, references)
    return {name: interval(resampled_means(values[None], np.ones((1, len(values))))) for name, values in scores.items()}


def rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measure in percent of each text: ROUGE-1, -2, -L (whole text) and -Lsum (sentence by sentence).

    Args:
        predictions: Generated texts.
        references: What they should be, in the same order.

    Raises:
        ValueError: There are none, or not as many of the one as of the other.
    """
    if not references:
        raise ValueError("no references to score against")
    scorer = rouge_scorer.RougeScorer(list(METRICS), tokenizer=RougeTokenizer())
    scores = [
        scorer.score(_lines(reference), _lines(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([100.0 * score[name].fmeasure for score in scores]) for name in METRICS}


def _lines(text: str) -> str:
    """One sentence a line, which is what ROUGE-Lsum goes by."""
    return "\n".join(sentence for sentence in SENTENCE_END.split(text.strip()) if sentence)
