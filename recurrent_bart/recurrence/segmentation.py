"""Functions that cut documents into segments, for lists and for tensors.

Masks stay on the host (CPU), so no function waits for the GPU to copy a mask back. `segment_size` counts the special
tokens and the new tokens of a segment; `input_size` also counts the overlap.
"""

# A flat document is one row of tokens that is not yet cut into segments.
# Shape suffixes: B documents, n tokens of a flat document, N segments, L tokens in a segment, X rows of an embedding
# table, D model width.

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy
import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig

# returns the token embeddings (B, L, D) of a segment when the segment is read
Segment = Callable[[], Tensor]

Token = TypeVar("Token")


def split_into_segments(
    tokens: Sequence[Token], segment_size: int, input_size: int, n_leading: int = 1, n_trailing: int = 1
) -> list[list[Token]]:
    """Cut one document into segments of at most `input_size` tokens.

    Each segment starts and ends with the document's special tokens, as in BART's pretraining. All segments but the
    first begin with an overlap: the last `input_size - segment_size` text tokens before the segment. A document that
    fits one segment is returned unchanged.

    Args:
        tokens: Tokens of the document: `n_leading` special tokens, the text, `n_trailing` special tokens.
        segment_size: Length of a segment with its special tokens, without the overlap.
        input_size: Length of a segment with its overlap.
        n_leading: Number of special tokens before the text.
        n_trailing: Number of special tokens after the text.

    Raises:
        ValueError: The document has no tokens, or a segment has no room for text.
    """
    if not tokens:
        raise ValueError("a document must have at least 1 token")
    if len(tokens) <= segment_size:
        return [list(tokens)]
    room = segment_size - n_leading - n_trailing
    if room < 1:
        raise ValueError(
            f"segment_size={segment_size} must be more than {n_leading + n_trailing}, the number of special tokens"
        )
    end = len(tokens) - n_trailing
    leading, text, trailing = list(tokens[:n_leading]), tokens[n_leading:end], list(tokens[end:])
    overlap = input_size - segment_size
    starts = range(0, len(text), room)
    return [leading + list(text[max(0, start - overlap) : start + room]) + trailing for start in starts]


def segment_positions(
    attention_mask: Tensor,
    input_ids: Tensor,
    special: tuple[int, int],
    segment_size: int,
    input_size: int,
    may_end_with_language: bool = False,
    may_be_empty: bool = False,
) -> Tensor:
    """Return, for each token of each segment, its index in the uncut row: `(B, N, L)`, -1 at padding.

    Args:
        attention_mask: `(B, n)`, 1 at the document's tokens.
        input_ids: `(B, n)`; the ids show if a row begins and ends with the special tokens.
        special: Ids that begin and end a document, `(bos, eos)`.
        may_end_with_language: A row may end with eos and a language code, which then end each segment, as in MBart.
        may_be_empty: A row without a token becomes a segment of padding.

    Raises:
        ValueError: A row has no token and `may_be_empty` is False; the message names the row.
    """
    rows: list[list[list[int]]] = []
    input_ids = input_ids.cpu()
    for row, mask in enumerate(attention_mask.tolist()):
        positions = [i for i, is_token in enumerate(mask) if is_token]
        if not positions and may_be_empty:
            rows.append([[-1]])
            continue
        if not positions:
            raise ValueError(f"attention_mask: row {row} has no tokens")
        n_leading = int(input_ids[row, positions[0]] == special[0])
        n_trailing = int(input_ids[row, positions[-1]] == special[1])
        if may_end_with_language and not n_trailing and len(positions) > 1:
            n_trailing = 2 * int(input_ids[row, positions[-2]] == special[1])
        rows.append(split_into_segments(positions, segment_size, input_size, n_leading, n_trailing))
    return pad_segments(rows, padding=-1)


def pad_segments(rows: list[list[list[int]]], padding: int) -> Tensor:
    """Pad documents to one shape `(B, N, L)`: add padding tokens to segments, and empty segments to documents."""
    n_segments = max(len(row) for row in rows)
    length = max(len(segment) for row in rows for segment in row)
    # `torch.tensor` takes nine times as long for a batch of lists
    padded = numpy.full((len(rows), n_segments, length), padding, dtype=numpy.int64)
    for document, row in zip(padded, rows, strict=True):
        for padded_segment, segment in zip(document, row, strict=False):
            padded_segment[: len(segment)] = segment
    return torch.from_numpy(padded)


def gather_segments(flat: Tensor, positions_BNL: Tensor, fill: float) -> Tensor:
    """Gather `(B, N, L, ...)` from `(B, n, ...)` at the indices from `segment_positions`; set padding to `fill`."""
    positions_BNL = to_device(positions_BNL, flat.device)
    rows = torch.arange(len(flat), device=flat.device).view(-1, 1, 1)
    taken = flat[rows, positions_BNL.clamp(min=0)]
    is_padding = (positions_BNL < 0).view(*positions_BNL.shape, *[1] * (flat.dim() - 2))
    return taken.masked_fill(is_padding, fill)


def shift_segments(segments: Tensor, n_segments_B: Tensor) -> Tensor:
    """Roll each row of `(B, N, ...)` by its own number of segments, `n_segments_B` (on the host).

    If each row is rolled by its number of empty segments at the end, all documents end at the last segment. All rows
    then share the truncated-BPTT windows, and the decoder finds each row's last segment at the same index.
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
    may_be_empty: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cut documents into segments; return ids or embeddings `(B, N, L, ...)`, and their mask on the host.

    In training, only the first `config.max_n_segments` segments remain. `may_be_empty` allows documents without a
    token; an input without any position becomes one position of padding per document.

    Raises:
        ValueError: A segment is longer than `config.input_size`, or uncut embeddings need more than one segment.
    """
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    is_flat = tokens.dim() == (2 if inputs_embeds is None else 3)
    shape = tokens.shape[: 2 if is_flat else 3]
    if 0 in shape[1:]:
        tokens = tokens.new_zeros(shape[0], 1, 1, *tokens.shape[len(shape) :])
        return tokens, torch.zeros(tokens.shape[:3], dtype=torch.long)
    mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else attention_mask.cpu()
    if is_flat and shape[1] <= config.segment_size:
        # one segment: unchanged, as BART would see it
        return tokens.unsqueeze(1), mask.unsqueeze(1)
    if is_flat and input_ids is None:
        raise ValueError(
            f"inputs_embeds has {shape[1]} positions, more than segment_size={config.segment_size}. Only ids show "
            "which tokens are special, so give input_ids, or inputs_embeds in segments (B, N, L, D)"
        )
    if is_flat:
        special = config.bos_token_id, config.eos_token_id
        sizes = config.segment_size, config.input_size
        positions = segment_positions(mask, input_ids, special, *sizes, config.wraps_last_label, may_be_empty)
        tokens, mask = gather_segments(tokens, positions, config.pad_token_id), (positions >= 0).to(mask.dtype)
    if tokens.shape[2] > config.input_size:
        raise ValueError(f"segments have {tokens.shape[2]} tokens, but input_size is {config.input_size}")
    if is_training and config.max_n_segments != -1:
        tokens, mask = tokens[:, : config.max_n_segments], mask[:, : config.max_n_segments]
    return tokens, mask


def has_barts_shapes(config: RecurrentBartConfig, mask_BNL: Tensor) -> bool:
    """Return True if uncut documents are read as BART reads documents: without a prefix, as one segment."""
    return not config.pre_seq_len and mask_BNL.shape[1] == 1


def align_at_end(segments: Tensor, mask_BNL: Tensor, may_be_empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Shift documents so that all end at the last segment.

    `mask_BNL` is on the host; `may_be_empty` allows documents without a token.

    Returns:
        Shifted segments, shifted mask, and the number of segments that each row was shifted by, `(B,)`.

    Raises:
        ValueError: A row has no token and `may_be_empty` is False; the message names the row.
    """
    is_read_BN = mask_BNL.bool().any(dim=-1)
    has_none = ~is_read_BN.any(dim=1)
    if not may_be_empty and has_none.any():
        raise ValueError(f"attention_mask: row {int(has_none.nonzero()[0])} has no tokens")
    # argmax returns the first maximum: 0 for a row without tokens
    n_empty_B = is_read_BN.flip(1).int().argmax(dim=1)
    return shift_segments(segments, n_empty_B), shift_segments(mask_BNL, n_empty_B), n_empty_B


def align_targets(target_segments_BN: Tensor, mask_BNL: Tensor, n_empty_B: Tensor) -> Tensor:
    """Shift one boolean per segment as `align_at_end` shifts the segments.

    Raises:
        ValueError: The shape differs from the number of documents and segments.
    """
    if target_segments_BN.shape != mask_BNL.shape[:2]:
        raise ValueError(
            f"labels or target_segments have the shape {tuple(target_segments_BN.shape)} in documents and segments, "
            f"but the input has {tuple(mask_BNL.shape[:2])}"
        )
    return shift_segments(target_segments_BN, n_empty_B)


def embed_segments_lazily(embed: nn.Module, ids_BNL: Tensor, vocab_size: int) -> list[Segment]:
    """Return one function per segment that computes the segment's token embeddings; they need no gradient.

    A call of an embedding table that ZeRO-3 shards is a collective, but ranks have different numbers of segments. So
    the table is called only once, for all tokens or for the whole vocabulary, whichever is smaller. The functions look
    up rows of this result, so memory does not grow with the document.
    """
    if not is_sharded(embed):
        return [functools.partial(embed, ids_BL) for ids_BL in ids_BNL.unbind(dim=1)]
    has_many = ids_BNL.numel() > vocab_size
    with torch.no_grad():
        rows_XD = embed(torch.arange(vocab_size, device=ids_BNL.device) if has_many else ids_BNL.flatten())
    places_BNL = ids_BNL if has_many else torch.arange(len(rows_XD), device=ids_BNL.device).view_as(ids_BNL)
    return [functools.partial(nn.functional.embedding, places_BL, rows_XD) for places_BL in places_BNL.unbind(dim=1)]


def is_sharded(module: nn.Module) -> bool:
    """Return True if ZeRO-3 shards the module's parameters and gathers them for each call."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def is_traced() -> bool:
    """Return True while torch.compile, torch.export or torch.jit.trace trace tensors whose values are unknown."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def on_device(known: Tensor, device: torch.device) -> Tensor:
    """Return host booleans on a device without waiting for the device; if all are equal, no copy is made."""
    if known.device.type == device.type or (known.any() and not known.all()):
        return to_device(known, device)
    return torch.full_like(known, bool(known.any()), device=device)


def to_device(known: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device without waiting for the device.

    CUDA copies use pinned memory. A copy from pageable memory may wait for earlier work of the CUDA stream ("API
    synchronization behavior" of the CUDA runtime).
    """
    is_pinned_first = device.type == "cuda" and known.device.type == "cpu"
    # contiguous, because PyTorch gathers other tensors into pageable memory before it copies them
    return (known.contiguous().pin_memory() if is_pinned_first else known).to(device, non_blocking=True)
