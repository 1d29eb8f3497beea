"""ROUGE of summaries (Lin 2004), by the rouge-score package."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score import rouge_scorer, tokenizers

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# scripts written without spaces: kana, Chinese characters, Thai
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
N_RESAMPLES = 1000


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


@dataclass(frozen=True)
class Score:
    """Mean F-measure in percent with its 95 % bootstrap interval over documents."""

    mean: float
    low: float
    high: float


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """ROUGE-1, -2, -L (whole text) and -Lsum (sentence by sentence).

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
    return {name: _score(np.array([100 * score[name].fmeasure for score in scores])) for name in METRICS}


def _score(values: np.ndarray) -> Score:
    resampled = np.random.default_rng(0).choice(values, (N_RESAMPLES, len(values)))
    low, high = np.percentile(resampled.mean(axis=1), (2.5, 97.5))
    return Score(float(values.mean()), float(low), float(high))


def _lines(text: str) -> str:
    """One sentence a line, which is what ROUGE-Lsum goes by."""
    return "\n".join(sentence for sentence in SENTENCE_END.split(text.strip()) if sentence)
