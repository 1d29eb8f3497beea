"""Batches cut where gradient is cut, so that each part has a backward pass of its own.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from recurrent_bart.data.batches import Batch
from recurrent_bart.segmentation import align_at_end, shift_segments
from recurrent_bart.targets import IGNORED


def count_windows(batch: Batch, window: int) -> int:
    """Number of windows of `window` segments that end with the batch's last segment."""
    return -(-batch.input_ids.shape[1] // window)


def bptt_windows(batch: Batch, window: int, n_windows: int) -> Iterator[Batch]:
    """Cut a batch with a target per segment at the boundaries that gradient does not cross.

    Memory then holds the graph of one window, however many segments there are. Documents end together, as in the
    encoder, so that all have the same boundaries; one that begins late has nothing to read in the first windows.

    Args:
        batch: Labels `(B, N, T)`.
        window: Segments of a window; the first has what is left over.
        n_windows: How many to give, at least `count_windows`: windows with nothing in them stand in front, for
            processes must make the same number of passes.
    """
    ids_BNL, mask_BNL, n_empty_B = align_at_end(batch.input_ids, batch.attention_mask)
    labels_BNT = shift_segments(batch.labels, n_empty_B)
    for _ in range(n_windows - count_windows(batch, window)):
        nothing = torch.zeros(len(ids_BNL), 1, 1, dtype=torch.long)
        yield replace(batch, input_ids=nothing, attention_mask=nothing, labels=torch.full_like(nothing, IGNORED))
    n_segments = ids_BNL.shape[1]
    starts = range(n_segments % window - window if n_segments % window else 0, n_segments, window)
    for start in starts:
        part = slice(max(0, start), start + window)
        yield replace(batch, input_ids=ids_BNL[:, part], attention_mask=mask_BNL[:, part], labels=labels_BNT[:, part])
