"""Results of an evaluation: what `launch/evaluate.py` prints and writes."""

from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.evaluation.mean_scores import (
    Group,
    by_document_length,
    by_section_position,
    mean_scores,
    mean_shares_by_tenth,
)
from recurrent_bart.evaluation.model_scores import MODEL_SCORES
from recurrent_bart.evaluation.predictions import Prediction
from recurrent_bart.monitoring.fields import SCORES, WORD_SCORES

# Scores that are printed for groups of texts. The JSON file has all scores of all groups.
GROUP_SCORES = ("rouge1", "rouge2", "repeated_4grams")


@dataclass
class Results:
    """Results of an evaluation: loss in nats per target token, and scores, which `monitoring/fields.py` describes."""

    n_documents: int
    n_texts: int
    loss: float
    scores: dict[str, Interval]
    by_document_length: list[Group]
    by_section_position: list[Group]
    shares_by_tenth: dict[str, list[Interval]]

    def lines(self) -> list[str]:
        """Return the results as text."""
        numbers = {"documents": str(self.n_documents), "texts": str(self.n_texts), "loss": f"{self.loss:.4f}"}
        descriptions = SCORES | WORD_SCORES | MODEL_SCORES
        numbers |= {name: f"{f'{score:.2f}':<22} {descriptions[name]}" for name, score in self.scores.items()}
        for kind, shares in self.shares_by_tenth.items():
            tenths = " ".join(f"{share.mean:.1f}" for share in shares)
            numbers[f"{kind}_by_tenth"] = f"{tenths}  bigrams found in each tenth of the source, in percent"
        lines = [f"{name:<22} {number}" for name, number in numbers.items()]
        for group in (*self.by_document_length, *self.by_section_position):
            scores = ", ".join(f"{name} {group.scores[name]:.2f}" for name in GROUP_SCORES if name in group.scores)
            lines.append(f"{group.name}: {group.n_texts} texts of {group.n_documents} documents, {scores}")
        return lines


def summarize_predictions(n_documents: int, loss: float, predictions: Sequence[Prediction]) -> Results:
    """Return the results of an evaluation on `n_documents` documents."""
    return Results(
        n_documents,
        len(predictions),
        loss,
        mean_scores(predictions),
        by_document_length(predictions),
        by_section_position(predictions),
        mean_shares_by_tenth(predictions),
    )
