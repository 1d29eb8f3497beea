"""Characters of the tokens that the decoder attends to, in the order of the positions of its context."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.text_encoder import Token


class ShownToken(NamedTuple):
    """Token of the decoder's context; with `decoder_context="memory"` also an earlier segment, shown by its state.

    Attributes:
        start: Index of the first character in the whole text; -1 for special tokens, and for slow tokenizers.
        end: Index behind the last character.
        ends_passage: True for the last token of a sentence or line, and for a segment.
        segment: Number of the segment, from 1. Negative: the next segment that is read removes it from the context.
    """

    start: int
    end: int
    ends_passage: bool
    segment: int


def show_segments(
    before: Sequence[ShownToken], segments: Sequence[Sequence[Token]], config: RecurrentBartConfig
) -> list[ShownToken]:
    """Return the tokens of the context after more segments are read.

    Args:
        before: Tokens of the context before.
        segments: Tokens of each new segment, special tokens and repeated tokens included.
    """
    first = abs(before[-1].segment) + 1 if before else 1
    shown = [token for token in before if token.segment > 0]
    for number, segment in enumerate(segments, start=first):
        shown += [ShownToken(token.start, token.end, token.ends_passage, number) for token in segment]
    last = first + len(segments) - 1
    n_seen = 1 if config.decoder_context == "last" else config.context_segments
    if n_seen != -1:
        shown = [token for token in shown if token.segment > last - n_seen]
    if config.decoder_context == "memory":
        shown = _earlier_segments(shown, last) + [token for token in shown if token.segment == last]
    return shown


def after_section(shown: Sequence[ShownToken], config: RecurrentBartConfig) -> list[ShownToken]:
    """Return the tokens of a context whose last segment ends a section."""
    ends = config.decoder_context == "section"
    return [token._replace(segment=-token.segment) for token in shown] if ends else list(shown)


def _earlier_segments(shown: Sequence[ShownToken], last: int) -> list[ShownToken]:
    """Return each segment before the last one as a whole."""
    spans: dict[int, list[ShownToken]] = {}
    for token in shown:
        if token.segment < last:
            spans.setdefault(token.segment, []).append(token)
    found = []
    for number, tokens in spans.items():
        starts, ends = [token.start for token in tokens if token.start >= 0], [token.end for token in tokens]
        found.append(ShownToken(min(starts, default=-1), max(ends), True, number))
    return found


def as_tensor(shown: Sequence[ShownToken], waiting: Sequence[Token]) -> Tensor:
    """Return a row of four numbers per token, for a file. `waiting` has the tokens that are not yet in the context."""
    rows = [*map(tuple, shown), *((token.start, token.end, token.ends_passage, 0) for token in waiting)]
    return torch.tensor(rows, dtype=torch.long).view(-1, 4)


def from_tensor(rows: Tensor, waiting: Sequence[int]) -> tuple[list[ShownToken], list[Token]]:
    """Return what `as_tensor` was given; `waiting` are the ids of the waiting tokens."""
    n_shown = len(rows) - len(waiting)
    shown = [ShownToken(start, end, bool(ends), segment) for start, end, ends, segment in rows[:n_shown].tolist()]
    tokens = [
        Token(id, start, end, bool(ends))
        for id, (start, end, ends, _) in zip(waiting, rows[n_shown:].tolist(), strict=True)
    ]
    return shown, tokens


def are_rows(rows: Tensor, n_waiting: int, n_shown: int) -> bool:
    """Return True if `as_tensor` could have returned this tensor for a text.

    `n_waiting` tokens are not shown yet; the context has `n_shown` tokens, without earlier segments.
    """
    if rows.dtype != torch.int64 or rows.dim() != 2 or rows.shape[1] != 4 or len(rows) < n_waiting:
        return False
    start, end, ends, segment = rows.unbind(dim=1)
    are_spans = (start >= -1) & (start <= end) & (end < 2**53) & ((ends == 0) | (ends == 1))
    segment = segment[: len(rows) - n_waiting].abs()
    are_numbers = (segment > 0) & (segment < 2**53)
    is_last = segment == segment[-1:] if n_shown < len(segment) else are_numbers
    return bool(are_spans.all() and are_numbers.all()) and int(is_last.sum()) == n_shown
