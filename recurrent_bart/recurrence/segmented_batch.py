"""Batch of documents that is segmented and aligned once, and then travels from the encoder to the decoder's context.

Shape suffixes: B documents, N segments, L tokens in a segment, M target segments (a target follows each).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import (
    align_at_end,
    align_targets,
    has_barts_shapes,
    segment_documents,
    shift_segments,
)

DECODE_AT = ("last_segment", "every_segment")


@dataclass(frozen=True)
class SegmentedBatch:
    """Segments of documents, aligned so that all documents end at the last segment.

    Attributes:
        tokens: Ids `(B, N, L)`, or embeddings `(B, N, L, D)`.
        attention_mask: `(B, N, L)`, 1 at tokens; on the CPU.
        n_empty: `(B,)`, number of segments that each document was shifted by; on the CPU.
        decodes_every_segment: True: the decoder's context after each segment is needed.
        target_segments: `(B, N)` booleans, True where a context is needed; on the CPU. None: see above.
        has_barts_shapes: True if the outputs have BART's shapes, without a dimension of segments.
    """

    tokens: Tensor
    attention_mask: Tensor
    n_empty: Tensor
    decodes_every_segment: bool
    target_segments: Tensor | None
    has_barts_shapes: bool

    @classmethod
    def build(
        cls,
        config: RecurrentBartConfig,
        is_training: bool,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
        may_be_empty: bool = False,
    ) -> "SegmentedBatch":
        """Segment and align documents; see RecurrentBartEncoder for arguments and errors.

        `may_be_empty` allows documents without a token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given, n_dimensions = (inputs_embeds, 3) if input_ids is None else (input_ids, 2)
        is_flat = given is not None and given.dim() == n_dimensions
        tokens, mask = segment_documents(config, is_training, input_ids, attention_mask, inputs_embeds, may_be_empty)
        tokens, mask_BNL, n_empty_B = align_at_end(tokens, mask, may_be_empty)
        if target_segments is not None:
            target_segments = align_targets(target_segments.cpu(), mask_BNL, n_empty_B)
        is_barts = is_flat and has_barts_shapes(config, mask_BNL)
        return cls(tokens, mask_BNL, n_empty_B, decode_at == "every_segment", target_segments, is_barts)

    @property
    def has_ids(self) -> bool:
        """True if `tokens` are ids that are not yet embedded."""
        return self.tokens.dim() == 3

    @property
    def is_read(self) -> Tensor:
        """`(B, N)` booleans, True at segments that their document has."""
        return self.attention_mask.bool().any(dim=-1)

    @property
    def decodes_several_segments(self) -> bool:
        """True if contexts after other segments than the last are needed."""
        return self.decodes_every_segment or self.target_segments is not None

    def check_decoded(self, state: RecurrentState | None) -> None:
        """Check that each document has the segments after which it is decoded; padding would be decoded instead.

        Raises:
            ValueError: A target segment has no text, or a document without text has none in `state` either; the message
                names the document.
        """
        if self.target_segments is not None:
            check_targets(self.unalign(self.target_segments), self.unalign(self.is_read))
        elif not self.decodes_every_segment and state is not None:
            is_empty_B = ~self.is_read.any(dim=1)
            if not is_empty_B.any():
                return
            # waits for the GPU, but only where a document has ended
            is_missing_B = is_empty_B & ~state.has_context().cpu()
            if is_missing_B.any():
                row = int(is_missing_B.nonzero()[0])
                raise ValueError(f"attention_mask: row {row} has no tokens, and state has no text of this document")

    def unalign(self, segments: Tensor) -> Tensor:
        """Undo the alignment of a tensor `(B, N, ...)`."""
        return shift_segments(segments, -self.n_empty)

    def target_order(self) -> Tensor:
        """Return `(M,)`: for each target segment in the given order, its row among the aligned target segments.

        The orders differ only if a target segment is one that its document does not have.
        """
        assert self.target_segments is not None
        number_BN = torch.arange(self.target_segments.numel()).view(self.target_segments.shape)
        return shift_segments(number_BN, self.n_empty)[self.target_segments].argsort()


def check_selection(decode_at: str, target_segments: Tensor | None) -> None:
    """Raise ValueError if `decode_at` is unknown, or `target_segments` are not booleans `(B, N)`."""
    if decode_at not in DECODE_AT:
        raise ValueError(f"decode_at={decode_at!r}: allowed are {', '.join(map(repr, DECODE_AT))}")
    dtype = getattr(target_segments, "dtype", type(target_segments).__name__)
    if target_segments is not None and (dtype != torch.bool or target_segments.dim() != 2):
        raise ValueError(f"target_segments: a tensor of booleans (documents, segments) is needed, but it has {dtype}")


def check_targets(target_segments_BN: Tensor, is_read_BN: Tensor) -> None:
    """Raise ValueError if a target segment is behind the last segment of its document."""
    is_missing_BN = target_segments_BN & ~is_read_BN
    if is_missing_BN.any():
        row, segment = is_missing_BN.nonzero()[0].tolist()
        raise ValueError(
            f"labels or target_segments: document {row} has a target at segment {segment} (both counted from 0), which "
            f"has no text; the document has {int(is_read_BN[row].sum())} segments in this call. At segments without "
            "text, set labels to -100, or target_segments to False"
        )


def check_one_target(target_segments: Tensor | None) -> None:
    """Raise ValueError unless each document has exactly one target segment."""
    if target_segments is not None and not bool((target_segments.sum(dim=1) == 1).all()):
        raise ValueError(
            "target_segments: a forward pass decodes once per document, so each document needs exactly one True; give "
            "labels (B, N, T), or call generate, for several"
        )


def read_selection(
    arguments: dict[str, Any], decode_at: str = DECODE_AT[0], target_segments: Tensor | None = None
) -> tuple[str, Tensor | None]:
    """Return `decode_at` and `target_segments`; their former name `every_segment` is removed from `arguments`."""
    every_segment = arguments.pop("every_segment", None)
    if every_segment is not None:
        warnings.warn(
            "every_segment is deprecated: use decode_at='every_segment', or target_segments=... for booleans (B, N)",
            FutureWarning,
            stacklevel=3,
        )
        if isinstance(every_segment, bool):
            decode_at = DECODE_AT[every_segment]
        else:
            target_segments = every_segment
    check_selection(decode_at, target_segments)
    return decode_at, target_segments
