"""How a document becomes segments: which token goes where, in lists and in tensors.

Shape suffixes: B documents, N segments, L tokens in a segment.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Token = TypeVar("Token")


def split_into_segments(
    tokens: Sequence[Token], segment_size: int, input_size: int, n_leading: int = 1, n_trailing: int = 1
) -> list[list[Token]]:
    """Cut one document into the segments that the encoder reads one after another.

    The special tokens around the document are put around every segment, so each one looks like what BART was
    pretrained on. In front of all segments but the first stands the overlap, the last `input_size - segment_size`
    tokens read before it.

    Args:
        tokens: The document's tokens with `n_leading` special tokens before and `n_trailing` after its text.
        segment_size: Length of a segment, special tokens included and overlap not.
        input_size: Length of a segment with its overlap.
        n_leading: Special tokens at the head.
        n_trailing: Special tokens at the end.

    Returns:
        Lists of at most `input_size` tokens. A document that fits one segment comes back as it is.

    Raises:
        ValueError: The document has no tokens, or a segment has no room for text.
    """
    if not tokens:
        raise ValueError("a document of 0 tokens has no segments")
    if len(tokens) <= segment_size:
        return [list(tokens)]
    room = segment_size - n_leading - n_trailing
    if room < 1:
        raise ValueError(f"segment_size={segment_size} leaves no room beside {n_leading + n_trailing} special tokens")
    end = len(tokens) - n_trailing
    leading, text, trailing = list(tokens[:n_leading]), tokens[n_leading:end], list(tokens[end:])
    overlap = input_size - segment_size
    starts = range(0, len(text), room)
    return [leading + list(text[max(0, start - overlap) : start + room]) + trailing for start in starts]


def segment_positions(
    attention_mask: Tensor, input_ids: Tensor | None, special: tuple[int, int], segment_size: int, input_size: int
) -> Tensor:
    """Where each token of each segment stands in its flat row.

    Args:
        attention_mask: `(B, n)`, 1 at the document's tokens.
        input_ids: `(B, n)`, to see whether rows begin and end with the special tokens; None: they do not.
        special: Ids that begin and end a document, `(bos, eos)`.
        segment_size: Length of a segment, special tokens included.
        input_size: Length of a segment with its overlap.

    Returns:
        `(B, N, L)` positions in the flat row, -1 at padding.

    Raises:
        ValueError: A row has no token; the message names it.
    """
    rows = []
    for row, mask in enumerate(attention_mask.tolist()):
        positions = [i for i, is_token in enumerate(mask) if is_token]
        if not positions:
            raise ValueError(f"attention_mask: row {row} is a document of 0 tokens")
        n_leading = n_trailing = 0
        if input_ids is not None:
            n_leading = int(input_ids[row, positions[0]] == special[0])
            n_trailing = int(input_ids[row, positions[-1]] == special[1])
        rows.append(split_into_segments(positions, segment_size, input_size, n_leading, n_trailing))
    return torch.tensor(pad_segments(rows, padding=-1), device=attention_mask.device)


def pad_segments(rows: list[list[list[int]]], padding: int) -> list[list[list[int]]]:
    """Give ragged documents one shape `(B, N, L)`, filled behind their tokens and behind their segments."""
    n_segments = max(len(row) for row in rows)
    length = max(len(segment) for row in rows for segment in row)
    empty = [padding] * length
    return [
        [segment + [padding] * (length - len(segment)) for segment in row] + [empty] * (n_segments - len(row))
        for row in rows
    ]


def gather_segments(flat: Tensor, positions_BNL: Tensor, fill: float) -> Tensor:
    """Take `(B, N, L, ...)` out of `(B, n, ...)` at the positions of `segment_positions`; `fill` at padding."""
    n_documents = flat.shape[0]
    rows = torch.arange(n_documents, device=flat.device).view(-1, 1, 1)
    taken = flat[rows, positions_BNL.clamp(min=0)]
    is_padding = (positions_BNL < 0).view(*positions_BNL.shape, *[1] * (flat.dim() - 2))
    return taken.masked_fill(is_padding, fill)


def empty_segments_at_end(is_read_BN: Tensor) -> Tensor:
    """Number of segments `(B,)` that each row has behind its document.

    Args:
        is_read_BN: `(B, N)` booleans, False where a segment has no token.

    Raises:
        ValueError: A row has no token in any segment; the message names it.
    """
    has_none = ~is_read_BN.any(dim=1)
    if has_none.any():
        raise ValueError(f"attention_mask: row {int(has_none.nonzero()[0])} is a document of 0 tokens")
    return is_read_BN.flip(1).int().argmax(dim=1)


def shift_segments(segments: Tensor, n_segments_B: Tensor) -> Tensor:
    """Move each row of `(B, N, ...)` by its own number of segments, those at the end coming back in front.

    Shifted by the empty segments at their end, all documents end at the last segment: then all rows share the
    boundaries at which gradient is cut, and the decoder finds each row's last segment in one place.
    """
    n_segments = segments.shape[1]
    rows = torch.arange(segments.shape[0], device=segments.device).unsqueeze(1)
    columns = torch.arange(n_segments, device=segments.device) - n_segments_B.unsqueeze(1)
    return segments[rows, columns % n_segments]
