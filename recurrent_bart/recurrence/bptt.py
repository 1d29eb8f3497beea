"""Truncated backpropagation through time (BPTT): windows of segments, and the segments that have an autograd graph.

Only this module turns `bptt_depth` into segments. All documents of a batch end at the last segment, so windows count
from there.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.segmentation import on_device

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class BpttWindows:
    """Windows of `size` segments that end at the last of `n_segments`; the first window has the remainder."""

    n_segments: int
    # None: one window holds all segments
    size: int | None

    def starts(self) -> list[int]:
        """Return the index of each window's first segment."""
        size = self.size or self.n_segments
        return [max(0, start) for start in range(-(-self.n_segments % size), self.n_segments, size)]

    def detaches_before(self, segment: int) -> bool:
        """Return True if a window begins at a segment; the first segment counts only if its window is complete."""
        return self.size is not None and (self.n_segments - segment) % self.size == 0

    def number(self, segment: Index) -> Index:
        """Return the window that holds a segment; windows count from the end of the document, from 0.

        Segments of earlier calls have negative indices.
        """
        return (self.n_segments - 1 - segment) // (self.size or self.n_segments)


def cuts_state(is_read_BN: Tensor, border: int, is_begun_B: Tensor) -> Tensor:
    """Return `(B,)`, True where the gradient of the state ends at the border before segment `border`.

    Segments in front of a document have no border. So the document must have read a segment of this call before the
    border, or have begun in an earlier call (`is_begun_B`, on the device) and read the segment at the border.
    """
    has_read_B, reads_B = is_read_BN[:, :border].any(dim=1), is_read_BN[:, border]
    return on_device(has_read_B, is_begun_B.device) | (is_begun_B & on_device(reads_B, is_begun_B.device))


def state_windows(config: RecurrentBartConfig, n_segments: int) -> BpttWindows:
    """Return the windows between which the state is detached.

    Without a carried state no gradient crosses a boundary, so each segment is a window.
    """
    return BpttWindows(n_segments, config.bptt_window if config.has_state else 1)


def target_windows(config: RecurrentBartConfig, n_segments: int) -> BpttWindows:
    """Return the windows of a batch with a target per segment; each window has its own backward pass."""
    return BpttWindows(n_segments, config.bptt_window)


def n_segments_with_graph(config: RecurrentBartConfig, is_read_BN: Tensor, has_target_segments: bool) -> int:
    """Return the number of last segments that have an autograd graph.

    `is_read_BN` is True at segments that their document has; all documents end at the last segment.

    With target segments, all segments have a graph. With one target at the end, the graph covers every window that
    holds a segment in the decoder's context.
    """
    n_segments = is_read_BN.shape[1]
    if has_target_segments or not n_segments:
        return n_segments
    n_seen = n_segments
    if config.decoder_context == "last":
        n_seen = 1
    elif config.context_segments != -1:
        n_seen = _n_last_segments(is_read_BN, config.context_segments)
    first_seen = n_segments - n_seen
    return n_segments - max(start for start in state_windows(config, n_segments).starts() if start <= first_seen)


def _n_last_segments(is_read_BN: Tensor, most: int) -> int:
    # number of last segments that hold the last `most` segments of each document
    from_end_BN = is_read_BN.flip(1)
    is_last_BN = from_end_BN & (from_end_BN.cumsum(dim=1) <= most)
    return max(1, int((is_last_BN * torch.arange(1, is_read_BN.shape[1] + 1)).max()))
