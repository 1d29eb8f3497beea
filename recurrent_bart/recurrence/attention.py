"""Attention over tokens, slots and prefixes, with any of Hugging Face's attention implementations."""

# A layer's prefix is its state as keys and values. Its slots are the positions that write the next state.
# Shape suffixes: B documents, H heads, K head width, A attended length, M memory positions, Q querying length,
# D model width.

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward

from recurrent_bart.recurrence.prefix_recurrence import KeyValue
from recurrent_bart.recurrence.segmentation import is_traced

# attention output (B, Q, H, K) and, from the eager back-end, the attention weights (B, H, Q, A)
Read = tuple[Tensor, Tensor | None]


def split_heads(attention: BartAttention, hidden: Tensor) -> Tensor:
    """Reshape `(B, A, D)` to `(B, H, A, K)`."""
    return hidden.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def attend(attention: BartAttention, query_BHQK: Tensor, key_value: Sequence[Tensor], mask: Tensor | None) -> Read:
    """Run the attention implementation that the configuration names; `mask` has the form that it needs."""
    back_end = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    read = functools.partial(
        back_end,
        attention,
        dropout=attention.dropout if attention.training else 0.0,
        scaling=attention.scaling,
        is_causal=False,
    )
    # only the mask of flash attention has two dimensions
    if mask is not None and mask.dim() == 2:
        return _attend_unpadded(read, query_BHQK, key_value, mask.bool()), None
    with without_nan_backward(key_value[0].shape[2], mask is not None):
        return read(query_BHQK, *key_value, mask)


def without_nan_backward(n_keys: int, has_mask: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context that disables cuDNN attention where its gradients can be NaN.

    With a mask, the gradients of queries can be NaN if the keys fill exactly half of the last tile of 128 keys and all
    scores of a query are below -88 (https://github.com/pytorch/pytorch/issues/196678). PyTorch chooses the backward
    kernel during the forward pass.
    """
    return without_cudnn() if has_mask and n_keys % 128 == 64 else contextlib.nullcontext()


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable cuDNN attention, which builds a plan for each new shape.

    A plan costs 52 to 78 ms of CPU time forward and 55 to 89 ms backward (H100, torch 2.11, studies/LOG.md). This
    exceeds a training step, so cuDNN is slow where the number of rows or their length changes often.
    """
    if is_traced():
        # a compiler chooses kernels itself
        yield
        return
    _cudnn_switch.turn_off()
    try:
        yield
    finally:
        _cudnn_switch.put_back()


class _CudnnSwitch:
    """Switch of cuDNN attention, which is one for all threads: the last one to leave puts it back."""

    def __init__(self) -> None:
        self._lock, self._n_inside, self._was_enabled = threading.Lock(), 0, False

    def turn_off(self) -> None:
        with self._lock:
            if not self._n_inside:
                self._was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._n_inside += 1

    def put_back(self) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                torch.backends.cuda.enable_cudnn_sdp(self._was_enabled)


_cudnn_switch = _CudnnSwitch()


def _attend_unpadded(
    read: Callable[..., Read], query_BHQK: Tensor, key_value: Sequence[Tensor], mask_BA: Tensor
) -> Tensor:
    """Run flash attention on rows packed without padding.

    Hugging Face uses the last Q columns of the key mask as the query mask. That mask is wrong for slots and for
    cross-attention, so this function computes every query.
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
    """Concatenate keys and values of several parts along the attended length."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def gated_read(read: Read, memory_read: Read, gate_BH: Tensor) -> Read:
    """Add the attention output `memory_read`, scaled by each head's gate, to the attention output `read`.

    The returned attention weights begin with the weights of `memory_read`. Gates are `(B, H)`, or `(1, H)` for all
    rows.
    """
    gate_BH1 = torch.tanh(gate_BH).unsqueeze(-1)
    values = read[0] + gate_BH1.unsqueeze(1) * memory_read[0]
    if read[1] is None:
        return values, None
    return values, torch.cat([gate_BH1.unsqueeze(-1) * memory_read[1], read[1]], dim=-1)
