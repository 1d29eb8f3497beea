"""Training targets made of a document's own sentences, for data sets with few summaries.

PEGASUS (Zhang et al. 2020, arXiv 1912.08777) removes the sentences that are most similar to the rest of the document,
and the model generates the removed sentences. Here half of the texts keep these sentences, because a model learns to
copy sentences before it learns to fill gaps.
"""

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex

from recurrent_bart.data.rows import Row
from recurrent_bart.data.words import n_usual_words, sentence_ends, words

# Placeholder of a removed sentence; the encoder replaces it by the mask token. A lone surrogate occurs in no document,
# but "<mask>" may.
GAP = "\ud800"
# First word of the text. It tells the model the task; a text with an ordinary summary has no first word of this kind.
KEPT, TAKEN = "extract: ", "gaps: "
# Approximate length of a target in words.
TARGET_WORDS = 60
# Shorter sentences are often headings. Longer ones are often not sentences.
SENTENCE_WORDS = range(8, 61)
# Range of the length in words of a piece (part of a document), which is shorter than a segment of 512 tokens.
PIECE_WORDS = (220, 300)
# Width in columns of the longest line of a paragraph from which its lines may be hard-wrapped.
LEAST_LINE_WIDTH = 45
PARAGRAPH_END = re.compile(r"(\n[ \t]*\n\s*)")
# The search begins at the end, so that a run of marks inside a line is not searched again and again.
FINAL_MARK = regex.compile(r"[\p{Sentence_Terminal}:]\p{P}*\s*$", regex.REVERSE)
BULLET = regex.compile(r"\s*([-*•・○●◆◎※]|\(?\w{1,3}[.)．）]\s)")
# Line end inside a sentence.
WRAP = re.compile(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)")
# Maximum number of consecutive pieces that form one document.
MOST_PIECES = 16
# Lower limit of the random factor on a sentence's score; randomness selects other sentences in each row.
LEAST_WEIGHT = 0.8


@dataclass(frozen=True)
class Sentence:
    """Sentence of a document.

    Attributes:
        text: Sentence with the white space after it.
        n_words: Number of words.
        value: ROUGE-1 precision of the sentence against the rest of the document (0 to 1); 0 excludes the sentence.
            PEGASUS uses the F-measure, which always prefers the longest sentence of a long document.
    """

    text: str
    n_words: int
    value: float


def gap_sentence_rows(row: Row, n_rows: int, task: str) -> Iterator[Row]:
    """Yield up to `n_rows` copies of a document with different targets. The document's own summaries are not used.

    For the section task, a third of the rows holds the whole document; all other rows hold pieces of the document. For
    the document task, all rows have the whole document. A document without a usable sentence yields no row.
    """
    sections = _sentences(row.sections)
    for number in range(n_rows):
        # The draw depends only on the document and the row number, so each run makes the same rows.
        draw = random.Random(f"{row.key()} {number}")
        if task == "document" or number % 3 == 0:
            # A whole document of the section task always keeps the sentences of its targets.
            made = [_ask(texts, draw, is_kept=task == "sections" or draw.random() < 0.5) for texts in sections]
        else:
            pieces = [piece for texts in sections for piece in _pieces(texts, draw.randint(*PIECE_WORDS))]
            made = [_ask(piece, draw, is_kept=draw.random() < 0.5) for piece in pieces]
            first = draw.randrange(max(1, len(made) - MOST_PIECES + 1))
            made = made[first : first + MOST_PIECES]
        asked = [both for both in made if both is not None]
        if asked:
            yield Row(f"{row.record_name()} ({number})", [text for text, _ in asked], [target for _, target in asked])


def _sentences(sections: Sequence[str]) -> list[list[Sentence]]:
    texts = [_with_ends(section) for section in sections]
    counts = [[Counter(words(text)) for text in section] for section in texts]
    whole: Counter[str] = Counter()
    for counted in itertools.chain.from_iterable(counts):
        whole += counted
    return [
        [Sentence(text, n_usual_words(own), _value(own, whole)) for text, own in zip(*both, strict=True)]
        for both in zip(texts, counts, strict=True)
    ]


def _with_ends(section: str) -> list[str]:
    """Split a section into sentences, with all white space kept. A line that continues in the next has no end."""
    wrapped = _wrapped_ends(section)
    ends = [end for end in sentence_ends(section) if end not in wrapped]
    return [section[start:stop] for start, stop in itertools.pairwise([0, *ends, len(section)]) if start < stop]


def _wrapped_ends(section: str) -> set[int]:
    """Return the index behind each line end at which a hard-wrapped sentence continues.

    A line is wrapped if it has no final mark and the next line's first word did not fit into it.
    """
    found: set[int] = set()
    start = 0
    for paragraph in PARAGRAPH_END.split(section):
        lines = paragraph.splitlines(keepends=True)
        longest = max((_width(line.rstrip()) for line in lines), default=0)
        for line, following in itertools.pairwise(lines):
            start += len(line)
            is_full = _width(line.rstrip()) + _width(_first_word(following)) >= longest >= LEAST_LINE_WIDTH
            if is_full and not FINAL_MARK.search(line) and not BULLET.match(following):
                found.add(start)
        start += len(lines[-1]) if lines else 0
    return found


def _width(text: str) -> int:
    """Return the number of columns of a text. Characters of East Asia have two."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _first_word(line: str) -> str:
    """Return the first word of a line and a space, or one character of a script without spaces."""
    word = line.split(maxsplit=1)[0] if line.strip() else ""
    return word[:1] if _width(word) > len(word) else f"{word} "


def _join_lines(sentence: str) -> str:
    """Return a sentence whose wrapped lines are one line; the white space after it stays."""
    return WRAP.sub(lambda wrap: "" if _width(sentence[wrap.start() - 1]) == 2 else " ", sentence)


def _value(own: Counter[str], whole: Counter[str]) -> float:
    if n_usual_words(own) not in SENTENCE_WORDS:
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
    """Return a text and its target.

    Return None if no sentence can be a target, or if the target would have more than half of the document's words.
    """
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
    target = "".join(_join_lines(sentences[number].text) for number in sorted(taken))
    return (KEPT if is_kept else TAKEN) + "".join(left), target.strip()


def _gap(sentence: Sentence) -> str:
    return GAP + sentence.text[len(sentence.text.rstrip()) :]
