"""ROUGE of summaries (Lin 2004), computed by the rouge-score package."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer, tokenizers

from recurrent_bart.data.word_segmenter import WordSegmenter
from recurrent_bart.data.words import segmented_words, sentences, words

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeTokenizer(tokenizers.Tokenizer):
    """Tokenizer that is identical to rouge-score's on ASCII text and keeps the words of all other scripts.

    Words are normalised, so that all Unicode forms of a text have the same words. In scripts without spaces, each
    character is a word, unless `segmenter` puts spaces between words.
    """

    def __init__(self, segmenter: WordSegmenter | None = None) -> None:
        self.ascii = tokenizers.DefaultTokenizer(use_stemmer=True)
        self.segmenter = segmenter

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text; ASCII words are stemmed."""
        if text.isascii():
            return self.ascii.tokenize(text)
        tokens: list[str] = []
        for word in self._words(text):
            tokens += self.ascii.tokenize(word) if word.isascii() else [word]
        return tokens

    def _words(self, text: str) -> list[str]:
        if self.segmenter is None:
            return words(text)
        return segmented_words(self.segmenter([_normalised(text)])[0])


def rouge_per_sample(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    segmenter: str | WordSegmenter = "none",
) -> dict[str, np.ndarray]:
    """Return ROUGE-1, -2, -L (whole text) and -Lsum (by sentence) of each text: F-measures in percent.

    With a word segmenter, the same scores of its words have names that end in `_words`. Scores without this ending
    compare characters in scripts without spaces.

    Of several references, the one with the highest F-measure counts, chosen for each ROUGE score by itself, as in
    rouge-score's `score_multi` and Hugging Face's evaluate.

    Raises:
        ValueError: There are no references, or the numbers of predictions and references differ.
    """
    if not references:
        raise ValueError("ROUGE needs at least one reference text")
    found = _scores(predictions, references, RougeTokenizer())
    if segmenter != "none":
        cutter = WordSegmenter(segmenter) if isinstance(segmenter, str) else segmenter
        # each further call would start a program
        remember_words(cutter, [*predictions, *(text for own in references for text in _as_list(own))])
        of_words = _scores(predictions, references, RougeTokenizer(cutter))
        found |= {f"{name}_words": scores for name, scores in of_words.items()}
    return found


def remember_words(segmenter: WordSegmenter, texts: Sequence[str]) -> None:
    """Segment texts at once, so that ROUGE finds their words without further starts of the segmenter."""
    segmenter.remember([_normalised(_by_line(text)) for text in texts if not text.isascii()])


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _scores(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenizer: RougeTokenizer
) -> dict[str, np.ndarray]:
    scorer = rouge_scorer.RougeScorer(list(METRICS), tokenizer=tokenizer)
    scores = [
        scorer.score_multi([_by_line(text) for text in _as_list(reference)], _by_line(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([100.0 * score[name].fmeasure for score in scores]) for name in METRICS}


def _as_list(reference: str | Sequence[str]) -> Sequence[str]:
    return [reference] if isinstance(reference, str) else reference


def _by_line(text: str) -> str:
    """Return the text with one sentence per line, as rouge-score requires for Lsum."""
    return "\n".join(sentences(text))
