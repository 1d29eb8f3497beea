"""Means of scores over texts, with intervals over documents: of all texts and of groups of texts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_bart.evaluation.bootstrap import Interval, intervals
from recurrent_bart.evaluation.measures import N_PARTS
from recurrent_bart.evaluation.predictions import Prediction

N_QUARTERS = 4


@dataclass(frozen=True)
class Group:
    """Mean scores of a group of texts."""

    name: str
    n_documents: int
    n_texts: int
    scores: dict[str, Interval]


def mean_scores(predictions: Sequence[Prediction]) -> dict[str, Interval]:
    """Return the mean of each score over texts, with its 95 % interval over documents."""
    if not predictions:
        return {}
    scores = {name: [prediction.scores[name] for prediction in predictions] for name in predictions[0].scores}
    return intervals(scores, [prediction.document for prediction in predictions])


def by_document_length(predictions: Sequence[Prediction]) -> list[Group]:
    """Return the mean scores of each quarter of the documents, the shortest documents first.

    The texts of one record may differ in length. Each text counts with its own length.
    """
    documents = sorted({_length_and_document(prediction) for prediction in predictions})
    # Fewer documents have no quarters.
    if len(documents) < N_QUARTERS:
        return []
    ends = [quarter * len(documents) // N_QUARTERS for quarter in range(N_QUARTERS + 1)]
    groups = []
    for start, stop in itertools.pairwise(ends):
        name = f"documents of {documents[start][0]:,} to {documents[stop - 1][0]:,} tokens"
        own = set(documents[start:stop])
        groups.append(_group(name, [it for it in predictions if _length_and_document(it) in own]))
    return groups


def by_section_position(predictions: Sequence[Prediction]) -> list[Group]:
    """Return the mean scores of the sections in each quarter of their documents, by the section's index."""
    quarters: dict[int, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.section is not None:
            quarters.setdefault(N_QUARTERS * prediction.section // prediction.n_sections, []).append(prediction)
    return [_group(f"quarter {quarter + 1} of the sections", quarters[quarter]) for quarter in sorted(quarters)]


def mean_shares_by_tenth(predictions: Sequence[Prediction]) -> dict[str, list[Interval]]:
    """Return the mean of `shares_by_tenth` of the texts and of the targets, for each tenth of the source."""
    found = {}
    for kind in ("text", "target"):
        known = [(shares, p.document) for p in predictions if (shares := p.shares_by_tenth[kind]) is not None]
        if known:
            tenths = {str(tenth): [shares[tenth] for shares, _ in known] for tenth in range(N_PARTS)}
            found[kind] = list(intervals(tenths, [document for _, document in known]).values())
    return found


def _length_and_document(prediction: Prediction) -> tuple[int, str]:
    return prediction.n_document_tokens, prediction.document


def _group(name: str, predictions: Sequence[Prediction]) -> Group:
    n_documents = len({prediction.document for prediction in predictions})
    return Group(name, n_documents, len(predictions), mean_scores(predictions))
