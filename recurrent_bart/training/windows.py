"""Windows of truncated BPTT: parts of a batch with separate backward passes.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.recurrence.bptt import target_windows
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
    smoothing: float = 0.0,
) -> Iterator[Tensor]:
    """Yield the loss of each truncated-BPTT window. Run the backward pass of each loss before taking the next loss.

    Args:
        model: Model, or an engine around it.
        config: Configuration of the model.
        batch: Documents.
        device: Device of the model.
        n_windows: Number of windows; at least the result of `count_windows`.
        n_items: Divisor of the summed losses.
        oracle: Oracle of scheduled sampling.
        smoothing: Share of each target that the loss spreads over the vocabulary.
    """
    windows: Iterable[Batch] = [batch]
    state = None
    if n_windows > 1:
        windows = bptt_windows(batch, config, n_windows)
        state = RecurrentState.unread(config, len(batch.labels), device)
    for window in windows:
        inputs = window.model_inputs(device)
        settings = {"num_items_in_batch": n_items, "oracle": oracle, "smoothing": smoothing}
        output = model(**inputs, state=state, **settings, return_logits=False)
        yield output.loss
        state = output.state and output.state.detach()


def has_windows(batch: Batch, config: RecurrentBartConfig) -> bool:
    """Return True if each truncated-BPTT window of a batch has its own backward pass.

    Separate passes need truncated BPTT and one target per segment. One target at the end has one backward pass.
    """
    return config.bptt_window is not None and batch.labels.dim() == 3


def count_windows(batch: Batch, config: RecurrentBartConfig) -> int:
    """Return the number of backward passes of a batch."""
    return len(target_windows(config, batch.input_ids.shape[1]).starts()) if has_windows(batch, config) else 1


def bptt_windows(batch: Batch, config: RecurrentBartConfig, n_windows: int) -> Iterator[Batch]:
    """Split a batch into truncated-BPTT windows. Gradients do not cross the boundary between two windows.

    Memory holds the autograd graph of only one window at a time. Documents are aligned at their end, as in the encoder,
    so all documents have the same boundaries. A short document has only padding in the first windows.

    Args:
        batch: Batch with labels `(B, N, T)`.
        config: Configuration of the model.
        n_windows: Windows to yield, at least `count_windows`. Empty windows come first, because all ranks must make the
            same number of passes.
    """
    ids_BNL, mask_BNL, n_empty_B = align_at_end(batch.input_ids, batch.attention_mask)
    labels_BNT = shift_segments(batch.labels, n_empty_B)
    starts = target_windows(config, ids_BNL.shape[1]).starts()
    for _ in range(n_windows - len(starts)):
        empty = torch.zeros(len(ids_BNL), 1, 1, dtype=torch.long)
        yield replace(batch, input_ids=empty, attention_mask=empty, labels=torch.full_like(empty, IGNORED))
    for part in itertools.starmap(slice, itertools.pairwise([*starts, ids_BNL.shape[1]])):
        yield replace(batch, input_ids=ids_BNL[:, part], attention_mask=mask_BNL[:, part], labels=labels_BNT[:, part])
