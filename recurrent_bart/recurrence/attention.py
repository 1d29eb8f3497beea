"""Attention over tokens, slots and prefixes, by any of Hugging Face's attention implementations.

Shape suffixes: B documents, H heads, K head width, A attended length, M memory positions, Q querying length,
D model width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward

from recurrent_bart.recurrence.prefix_recurrence import KeyValue
from recurrent_bart.recurrence.segmentation import is_traced

# what was read (B, Q, H, K) and, from the eager back-end, the weights (B, H, Q, A)
Read = tuple[Tensor, Tensor | None]


def split_heads(attention: BartAttention, hidden: Tensor) -> Tensor:
    """`(B, A, D)` to `(B, H, A, K)`."""
    return hidden.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def attend(attention: BartAttention, query_BHQK: Tensor, key_value: Sequence[Tensor], mask: Tensor | None) -> Read:
    """Attention by the back-end that the configuration names; `mask` in the form that Hugging Face makes for it."""
    back_end = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    read = functools.partial(
        back_end,
        attention,
        dropout=attention.dropout if attention.training else 0.0,
        scaling=attention.scaling,
        is_causal=False,
    )
    # flash attention's alone has two dimensions
    if mask is not None and mask.dim() == 2:
        return _attend_unpadded(read, query_BHQK, key_value, mask.bool()), None
    with without_nan_backward(key_value[0].shape[2], mask is not None):
        return read(query_BHQK, *key_value, mask)


def without_nan_backward(n_keys: int, has_mask: bool) -> contextlib.AbstractContextManager[None]:
    """Attention of PyTorch without cuDNN where gradients of that could be NaN.

    With a mask, and keys that fill half of its last tile of 128, those of queries are where a query's scores are all
    below -88 (https://github.com/pytorch/pytorch/issues/196678). Which kernel the backward pass has is decided in the
    forward pass.

    Args:
        n_keys: Of the attention that follows.
        has_mask: Whether it is given a mask.
    """
    return without_cudnn() if has_mask and n_keys % 128 == 64 else contextlib.nullcontext()


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention of PyTorch without cuDNN, which plans for each shape that is new to it.

    On an H100 with torch 2.11 a plan took 52 to 78 ms forward and 55 to 89 backward, of the processor's time
    (studies/LOG.md): more than a step, where the number of rows or their length often is another.
    """
    if is_traced():
        # a compiler plans for shapes itself
        yield
        return
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def _attend_unpadded(
    read: Callable[..., Read], query_BHQK: Tensor, key_value: Sequence[Tensor], mask_BA: Tensor
) -> Tensor:
    """Flash attention over keys of different number in each row, without their padding, one row behind the other.

    Hugging Face would take the last Q columns of the mask for the queries' own, which is right neither for slots nor
    for cross-attention. Here every query is answered.
    """
    n_rows, _, n_queries, _ = query_BHQK.shape
    n_keys_B = mask_BA.sum(dim=1, dtype=torch.int32)
    query = query_BHQK.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    key, value = (part.transpose(1, 2)[mask_BA].transpose(0, 1).unsqueeze(0) for part in key_value)
    values, _ = read(
        query,
        key,
        value,
        None,
        cu_seq_lens_q=n_queries * torch.arange(n_rows + 1, dtype=torch.int32, device=query.device),
        cu_seq_lens_k=nn.functional.pad(n_keys_B.cumsum(0, dtype=torch.int32), (1, 0)),
        max_length_q=n_queries,
        max_length_k=int(n_keys_B.max()),
    )
    return values.unflatten(1, (n_rows, n_queries)).squeeze(0)


def concat_keys(*parts: Sequence[Tensor]) -> KeyValue:
    """Keys and values of several parts, one behind the other."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def gated_read(read: Read, memory_read: Read, gate_BH: Tensor) -> Read:
    """What was read of memory, added through the gate of each head; memory's weights stand in front.

    Gates are of each row, or `(1, H)` for all.
    """
    gate_BH1 = torch.tanh(gate_BH).unsqueeze(-1)
    values = read[0] + gate_BH1.unsqueeze(1) * memory_read[0]
    if read[1] is None:
        return values, None
    return values, torch.cat([gate_BH1.unsqueeze(-1) * memory_read[1], read[1]], dim=-1)
