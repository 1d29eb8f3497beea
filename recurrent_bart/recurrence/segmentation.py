"""How a document becomes segments: which token goes where, in lists and in tensors.

Masks are looked at on the host, where they are from the first step on, so that nothing waits for the device to tell
what it was told.

Shape suffixes: B documents, N segments, L tokens in a segment, X different tokens, D model width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig

# gives the token embeddings (B, L, D) of a segment when it is read
Segment = Callable[[], Tensor]

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
    attention_mask: Tensor, input_ids: Tensor, special: tuple[int, int], segment_size: int, input_size: int
) -> Tensor:
    """Where each token of each segment stands in its flat row.

    Args:
        attention_mask: `(B, n)`, 1 at the document's tokens.
        input_ids: `(B, n)`, to see whether rows begin and end with the special tokens.
        special: Ids that begin and end a document, `(bos, eos)`.
        segment_size: Length of a segment, special tokens included.
        input_size: Length of a segment with its overlap.

    Returns:
        `(B, N, L)` positions in the flat row, -1 at padding.

    Raises:
        ValueError: A row has no token; the message names it.
    """
    rows = []
    input_ids = input_ids.cpu()
    for row, mask in enumerate(attention_mask.tolist()):
        positions = [i for i, is_token in enumerate(mask) if is_token]
        if not positions:
            raise ValueError(f"attention_mask: row {row} is a document of 0 tokens")
        n_leading = int(input_ids[row, positions[0]] == special[0])
        n_trailing = int(input_ids[row, positions[-1]] == special[1])
        rows.append(split_into_segments(positions, segment_size, input_size, n_leading, n_trailing))
    return torch.tensor(pad_segments(rows, padding=-1))


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
    positions_BNL = to_device(positions_BNL, flat.device)
    rows = torch.arange(len(flat), device=flat.device).view(-1, 1, 1)
    taken = flat[rows, positions_BNL.clamp(min=0)]
    is_padding = (positions_BNL < 0).view(*positions_BNL.shape, *[1] * (flat.dim() - 2))
    return taken.masked_fill(is_padding, fill)


def shift_segments(segments: Tensor, n_segments_B: Tensor) -> Tensor:
    """Move each row of `(B, N, ...)` by its own number of segments, those at the end coming back in front.

    Shifted by the empty segments at their end, all documents end at the last segment: then all rows share the
    boundaries at which gradient is cut, and the decoder finds each row's last segment in one place.

    Args:
        segments: On any device.
        n_segments_B: On the host.
    """
    if not n_segments_B.any():
        return segments
    n_segments, n_segments_B = segments.shape[1], to_device(n_segments_B, segments.device)
    rows = torch.arange(segments.shape[0], device=segments.device).unsqueeze(1)
    columns = torch.arange(n_segments, device=segments.device) - n_segments_B.unsqueeze(1)
    return segments[rows, columns % n_segments]


def segment_documents(
    config: RecurrentBartConfig,
    is_training: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Ids or embeddings as `(B, N, L, ...)` with their mask, which is on the host.

    In training, documents are cut after `config.max_n_segments`.

    Raises:
        ValueError: A segment is longer than `config.input_size`, or flat embeddings are of several segments.
    """
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    is_flat = tokens.dim() == (2 if inputs_embeds is None else 3)
    shape = tokens.shape[: 2 if is_flat else 3]
    mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else attention_mask.cpu()
    if is_flat and shape[1] <= config.segment_size:
        # one segment: exactly as it came, as BART would see it
        return tokens.unsqueeze(1), mask.unsqueeze(1)
    if is_flat and input_ids is None:
        raise ValueError(
            f"inputs_embeds of {shape[1]} positions: segment_size is {config.segment_size}, and embeddings do not show "
            "which of them are the special tokens that every segment needs; give input_ids, or segments (B, N, L, D)"
        )
    if is_flat:
        special = config.bos_token_id, config.eos_token_id
        positions = segment_positions(mask, input_ids, special, config.segment_size, config.input_size)
        tokens, mask = gather_segments(tokens, positions, config.pad_token_id), (positions >= 0).to(mask.dtype)
    if tokens.shape[2] > config.input_size:
        raise ValueError(f"segments of {tokens.shape[2]} tokens: input_size is {config.input_size}")
    if is_training and config.max_n_segments != -1:
        tokens, mask = tokens[:, : config.max_n_segments], mask[:, : config.max_n_segments]
    return tokens, mask


def has_barts_shapes(config: RecurrentBartConfig, mask_BNL: Tensor) -> bool:
    """Return True if flat documents are read as BART reads them: without a prefix, as one segment."""
    return not config.pre_seq_len and mask_BNL.shape[1] == 1


def align_at_end(segments: Tensor, mask_BNL: Tensor, may_be_empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Move documents so that all end at the last segment.

    Args:
        segments: `(B, N, ...)`, on any device.
        mask_BNL: 1 at tokens, on the host.
        may_be_empty: Some documents may have no token at all here.

    Returns:
        Both, moved, and by how many segments `(B,)` each row was moved.

    Raises:
        ValueError: A row has no token in any segment and may not; the message names it.
    """
    is_read_BN = mask_BNL.bool().any(dim=-1)
    has_none = ~is_read_BN.any(dim=1)
    if not may_be_empty and has_none.any():
        raise ValueError(f"attention_mask: row {int(has_none.nonzero()[0])} is a document of 0 tokens")
    # argmax finds the first: of a row without any, 0
    n_empty_B = is_read_BN.flip(1).int().argmax(dim=1)
    return shift_segments(segments, n_empty_B), shift_segments(mask_BNL, n_empty_B), n_empty_B


def align_marks(marked_BN: Tensor, mask_BNL: Tensor, n_empty_B: Tensor) -> Tensor:
    """Booleans of segments moved as `align_at_end` has moved these.

    Raises:
        ValueError: They are of other documents or segments than there are.
    """
    if marked_BN.shape != mask_BNL.shape[:2]:
        raise ValueError(
            f"labels or every_segment for {tuple(marked_BN.shape)} documents and segments: there are "
            f"{tuple(mask_BNL.shape[:2])}"
        )
    return shift_segments(marked_BN, n_empty_B)


def embed_segments_lazily(embed: nn.Module, ids_BNL: Tensor, vocab_size: int) -> list[Segment]:
    """Token embeddings of segments, made as each is read; no gradient reaches them.

    A sharded table is gathered by every call, in which all processes take part, whatever the number of their segments.
    So it is called once, now, on whatever is the least: all these tokens, or the vocabulary, of which the rows are
    taken later. Either way memory does not grow with the document.
    """
    if not is_sharded(embed):
        return [functools.partial(embed, ids_BL) for ids_BL in ids_BNL.unbind(dim=1)]
    has_many = ids_BNL.numel() > vocab_size
    with torch.no_grad():
        rows_XD = embed(torch.arange(vocab_size, device=ids_BNL.device) if has_many else ids_BNL.flatten())
    places_BNL = ids_BNL if has_many else torch.arange(len(rows_XD), device=ids_BNL.device).view_as(ids_BNL)
    return [functools.partial(nn.functional.embedding, places_BL, rows_XD) for places_BL in places_BNL.unbind(dim=1)]


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds its parameters, and gathers them for each call."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def is_traced() -> bool:
    """Return True while torch.compile, torch.export or torch.jit.trace record tensors whose values are unknown."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def on_device(known: Tensor, device: torch.device) -> Tensor:
    """Booleans that the host knows, on a device that is not waited for; nothing is copied where all are the same."""
    if known.device.type == device.type or (known.any() and not known.all()):
        return to_device(known, device)
    return torch.full_like(known, bool(known.any()), device=device)


def to_device(known: Tensor, device: torch.device) -> Tensor:
    """What the host knows, on a device that is not waited for.

    From pinned memory: a copy of any other may wait for what the stream was given before ("API synchronization
    behavior" of the CUDA runtime).
    """
    is_pinned_first = device.type == "cuda" and known.device.type == "cpu"
    return (known.pin_memory() if is_pinned_first else known).to(device, non_blocking=True)
