"""Checks of the decoder's targets, and the loss.

Shape suffixes: B documents, T target length, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.recurrence.segmentation import is_traced

# label of a position without a target
IGNORED = -100


def on_host(labels: Tensor) -> Tensor | None:
    """Copy labels to the CPU, which waits for the GPU; return None during tracing or CUDA graph capture."""
    if is_traced() or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return labels.cpu()


def check_labels(labels: Tensor, vocab_size: int, every_row: bool) -> None:
    """Check labels `(B, T)`, or `(M, T)` for M segments of several documents.

    Raise a ValueError that names the row if an id is outside the vocabulary, or with `every_row` a row has no target.
    """
    is_outside = ((labels < 0) & (labels != IGNORED)) | (labels >= vocab_size)
    if is_outside.any():
        row, column = is_outside.nonzero()[0].tolist()
        raise ValueError(
            f"labels: row {row} holds {int(labels[row, column])} at position {column}; allowed are ids from 0 to "
            f"{vocab_size - 1}, and {IGNORED} for no target"
        )
    is_empty = (labels == IGNORED).all(dim=-1)
    if every_row and is_empty.any():
        raise ValueError(f"labels: row {int(is_empty.nonzero()[0])} has no target, only {IGNORED}")


def wrap_last_label(labels_BT: Tensor, pad_token_id: int) -> Tensor:
    """Return MBart's decoder inputs: labels shifted to the right, with the last label of each row in front.

    The last label of MBart's targets is the language code. A row without a target gives padding.
    """
    inputs_BT = labels_BT.masked_fill(labels_BT == IGNORED, pad_token_id)
    last_B1 = (inputs_BT != pad_token_id).sum(dim=1, keepdim=True) - 1
    return torch.cat([inputs_BT.gather(1, last_B1.clamp(min=0)), inputs_BT[:, :-1]], dim=1)


def check_decoder_start(decoder_input_ids: Tensor, expected_ids: Tensor, name: str) -> None:
    """Raise a ValueError that names the first row of decoder inputs that is not shifted to the right.

    `expected_ids` are the decoder inputs of the labels; `name` says what they begin with.
    """
    if is_traced():
        return
    is_wrong = decoder_input_ids[:, 0] != expected_ids[:, 0].to(decoder_input_ids.device)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"decoder_input_ids: row {row} begins with {int(decoder_input_ids[row, 0])}, but must begin with "
            f"{name}={int(expected_ids[row, 0])}"
        )


def check_unused(arguments: Mapping[str, Any], cause: str) -> None:
    """Raise a ValueError that names the arguments that are not None, because `cause` makes them useless."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not used with {cause}; remove")


def token_loss(
    logits_BTV: Tensor, labels_BT: Tensor, num_items_in_batch: Tensor | int | None, smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy, summed over targets in float32 at least and divided by the number of targets.

    Labels are -100 where there is no target. `num_items_in_batch` is the number of targets in the whole optimizer step;
    None: the number in `labels_BT`. `smoothing` is `label_smoothing` of `torch.nn.functional.cross_entropy`.
    """
    return per_target(summed_loss(logits_BTV, labels_BT, smoothing), labels_BT, num_items_in_batch)


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy summed over targets, in float32 at least."""
    precise = torch.promote_types(logits_BTV.dtype, torch.float32)
    return nn.functional.cross_entropy(
        logits_BTV.to(precise).flatten(0, 1),
        labels_BT.flatten().to(logits_BTV.device),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )


def per_target(total: Tensor, labels_BT: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a summed loss by the number of targets; see `token_loss`."""
    if num_items_in_batch is None:
        num_items_in_batch = (labels_BT != IGNORED).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
