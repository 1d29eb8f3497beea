"""Targets made of a document's own sentences, for where there are few summaries to learn to read from.

PEGASUS (Zhang et al. 2020, arXiv 1912.08777) takes the sentences that are most like the rest of a document out of it
and asks for them. Here half of the texts leave them in: to find and copy is learnt before to fill in.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recurrent_bart.data.rows import Row
from recurrent_bart.data.words import SENTENCE_END, words

# In the place of a sentence that was taken out, for the mask token. Half of a character, which no document holds: a
# document may say "<mask>".
GAP = "\ud800"
# what a text begins with, for a summary of its own is wanted where it begins with neither
KEPT, TAKEN = "extract: ", "gaps: "
# of each text, a little more or less
TARGET_WORDS = 60
# shorter sentences are headings and the like, longer ones no sentences
SENTENCE_WORDS = range(8, 61)
# of a piece of a section: less than a segment of 512 tokens
PIECE_WORDS = (220, 300)
# of a document, from anywhere in it: as many as are likely to be read together
MOST_PIECES = 16
# how much the best sentences are preferred to the next ones, so that another time others are taken
LEAST_WEIGHT = 0.8


@dataclass(frozen=True)
class Sentence:
    """One of a document.

    Attributes:
        text: As it stands, and what is between it and the next one.
        n_words: How many.
        value: Share of its words that the rest of the document has too, as often (ROUGE-1's precision); 0 where it is
            not to be taken. The F-measure, by which PEGASUS goes, would be highest for the longest of a long document.
    """

    text: str
    n_words: int
    value: float


def gap_sentence_rows(row: Row, n_rows: int, task: str) -> Iterator[Row]:
    """The document again, with other targets each time; a third of the rows has it whole, the others have its pieces.

    Args:
        row: A document; its summaries are not used.
        n_rows: How many, at most: one with no sentence to take gives none.
        task: `"sections"`, or `"document"`, of which all rows have it whole, for it has one target.
    """
    sections = _sentences(row.sections)
    for number in range(n_rows):
        # the same ones wherever and whenever they are made
        draw = random.Random(f"{row.key()} {number}")
        if task == "document" or number % 3 == 0:
            # whole ones are asked for what they keep where there is a target for each section
            made = [_ask(texts, draw, is_kept=task == "sections" or draw.random() < 0.5) for texts in sections]
        else:
            pieces = [piece for texts in sections for piece in _pieces(texts, draw.randint(*PIECE_WORDS))]
            made = [_ask(piece, draw, is_kept=draw.random() < 0.5) for piece in pieces]
            first = draw.randrange(max(1, len(made) - MOST_PIECES + 1))
            made = made[first : first + MOST_PIECES]
        asked = [both for both in made if both is not None]
        if asked:
            yield Row(f"{row.id} ({number})", [text for text, _ in asked], [target for _, target in asked])


def _sentences(sections: Sequence[str]) -> list[list[Sentence]]:
    texts = [_with_ends(section) for section in sections]
    counts = [[Counter(words(text)) for text in section] for section in texts]
    whole: Counter[str] = Counter()
    for counted in itertools.chain.from_iterable(counts):
        whole += counted
    return [
        [Sentence(text, own.total(), _value(own, whole)) for text, own in zip(*both, strict=True)]
        for both in zip(texts, counts, strict=True)
    ]


def _with_ends(section: str) -> list[str]:
    """Its sentences; joined, they are the section."""
    ends = [match.end() for match in SENTENCE_END.finditer(section)]
    return [section[start:stop] for start, stop in itertools.pairwise([0, *ends, len(section)]) if start < stop]


def _value(own: Counter[str], whole: Counter[str]) -> float:
    if own.total() not in SENTENCE_WORDS:
        return 0.0
    return sum(min(n, whole[word] - n) for word, n in own.items()) / own.total()


def _pieces(sentences: Sequence[Sentence], n_words: int) -> Iterator[list[Sentence]]:
    piece: list[Sentence] = []
    for sentence in sentences:
        if piece and sum(it.n_words for it in piece) + sentence.n_words > n_words:
            yield piece
            piece = []
        piece.append(sentence)
    if piece:
        yield piece


def _ask(sentences: Sequence[Sentence], draw: random.Random, is_kept: bool) -> tuple[str, str] | None:
    """A text and its target; None: there is nothing to ask for, or too little would be left to tell it from."""
    order = sorted(
        (number for number, it in enumerate(sentences) if it.value),
        key=lambda number: -sentences[number].value * draw.uniform(LEAST_WEIGHT, 1.0),
    )
    taken: set[int] = set()
    n_taken = 0
    for number in order:
        if n_taken < TARGET_WORDS:
            taken.add(number)
            n_taken += sentences[number].n_words
    if not taken or 2 * n_taken > sum(it.n_words for it in sentences):
        return None
    left = [_gap(it) if number in taken and not is_kept else it.text for number, it in enumerate(sentences)]
    target = "".join(sentences[number].text for number in sorted(taken))
    return (KEPT if is_kept else TAKEN) + "".join(left), target.strip()


def _gap(sentence: Sentence) -> str:
    return GAP + sentence.text[len(sentence.text.rstrip()) :]
