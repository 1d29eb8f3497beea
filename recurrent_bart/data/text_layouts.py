"""Texts in the layouts of records: a text, a list of its sentences, or a list of speaker turns."""

from collections.abc import Sequence
from typing import Any

from recurrent_bart.data.word_segmenter import HAS_JAPANESE, is_segmented

LAYOUTS = "a text, a list of its sentences, or a list of speaker turns"
# Keys of a speaker turn; the text is under the first key that the turn has.
SPEAKER, TURN_TEXTS = "speaker", ("text", "content")


class LayoutError(ValueError):
    """Error about the layout of a value. Its text continues a sentence about the column."""


def read_layout(value: Any) -> str:
    """Return the value of a record's text column as one text.

    Sentences are joined by `join_sentences`. A turn `{"speaker": ..., "text": ...}` becomes a line `speaker: text`.
    None is an empty text, in a list too.

    Raises:
        LayoutError: The value has another layout.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise LayoutError(f"must be {LAYOUTS}, not {type(value).__name__}")
    is_of_turns = any(isinstance(item, dict) for item in value)
    for number, item in enumerate(value, start=1):
        if item is not None and not isinstance(item, dict if is_of_turns else str):
            beside = " beside turns" if is_of_turns else ""
            raise LayoutError(f"must be {LAYOUTS}; item {number} of the list is of type {type(item).__name__}{beside}")
    if is_of_turns:
        turns = (_turn(turn, number) for number, turn in enumerate(value, start=1) if turn is not None)
        return "\n".join(turn for turn in turns if turn)
    return join_sentences([sentence for sentence in value if sentence])


def join_sentences(sentences: Sequence[str]) -> str:
    """Join sentences with a space, or with nothing beside Japanese or Chinese characters.

    Sentences whose words have spaces between them already are joined with spaces. Blank sentences are left out, and
    white space around a sentence too.
    """
    stripped = [sentence.strip() for sentence in sentences]
    stripped = [sentence for sentence in stripped if sentence]
    # Decide before the sentences are joined: a space between short sentences is no space between words.
    text = "".join(stripped)
    if not HAS_JAPANESE.search(text) or is_segmented(text):
        return " ".join(stripped)
    joined = "".join(stripped[:1])
    for sentence in stripped[1:]:
        is_beside = HAS_JAPANESE.match(joined[-1]) or HAS_JAPANESE.match(sentence)
        joined += sentence if is_beside else f" {sentence}"
    return joined


def _turn(turn: dict[str, Any], number: int) -> str:
    """Return the line of a speaker turn; empty if nothing was said."""
    speaker, text = turn.get(SPEAKER), next((turn[key] for key in TURN_TEXTS if turn.get(key) is not None), None)
    if not isinstance(text, str):
        found = "no text" if text is None else f"a text of type {type(text).__name__}"
        raise LayoutError(f"has a speaker turn with {found}: turn {number}, whose keys are {_listed(turn)}")
    if not isinstance(speaker, str | int | None):
        raise LayoutError(f"has a speaker turn whose speaker is of type {type(speaker).__name__}: turn {number}")
    line = join_sentences(text.splitlines())
    name = "" if speaker is None else str(speaker).strip()
    return f"{name}: {line}" if name and line else line


def _listed(turn: dict[str, Any]) -> str:
    return ", ".join(map(repr, turn)) or "none"
