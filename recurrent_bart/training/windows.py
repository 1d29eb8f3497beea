"""Batches cut where gradient is cut, so that each part has a backward pass of its own.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import align_at_end, shift_segments


def window_losses(
    model: Any,
    config: RecurrentBartConfig,
    batch: Batch,
    device: torch.device,
    n_windows: int,
    n_items: float,
    oracle: Oracle | None = None,
) -> Iterator[Tensor]:
    """Loss of each window of a batch, one after the other; the caller runs the backward pass of each before the next.

    Args:
        model: The model, or an engine around it.
        config: Its architecture.
        batch: Documents.
        device: Where the model is.
        n_windows: From `count_windows`, or more.
        n_items: What the summed losses are divided by.
        oracle: Whose words the decoder reads beside the target's.
    """
    windows: Iterable[Batch] = [batch]
    state = None
    if n_windows > 1:
        windows = bptt_windows(batch, config.bptt_window, n_windows)
        state = RecurrentState.unread(config, len(batch.labels), device)
    for window in windows:
        inputs = window.model_inputs(device)
        output = model(**inputs, state=state, num_items_in_batch=n_items, oracle=oracle, return_logits=False)
        yield output.loss
        state = output.state and output.state.detach()


def has_windows(batch: Batch, config: RecurrentBartConfig) -> bool:
    """Whether parts of a batch have backward passes of their own: gradient has a horizon, and targets within each.

    With one target behind it all, what stands before the last window runs without a graph.
    """
    return config.bptt_window is not None and batch.labels.dim() == 3


def count_windows(batch: Batch, config: RecurrentBartConfig) -> int:
    """Number of backward passes of a batch."""
    return -(-batch.input_ids.shape[1] // config.bptt_window) if has_windows(batch, config) else 1


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
    n_segments = ids_BNL.shape[1]
    for _ in range(n_windows - -(-n_segments // window)):
        nothing = torch.zeros(len(ids_BNL), 1, 1, dtype=torch.long)
        yield replace(batch, input_ids=nothing, attention_mask=nothing, labels=torch.full_like(nothing, IGNORED))
    for start in range(-(-n_segments % window), n_segments, window):
        part = slice(max(0, start), start + window)
        yield replace(batch, input_ids=ids_BNL[:, part], attention_mask=mask_BNL[:, part], labels=labels_BNT[:, part])
