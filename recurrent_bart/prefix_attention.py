"""Attention that reads memory: in the encoder's cells and in the decoder's cross-attention.

Shape suffixes: B documents, H heads, K head width, A attended length, M memory positions, Q querying length,
D model width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import Packing
from recurrent_bart.prefix_recurrence import KeyValue
from recurrent_bart.segmentation import is_traced

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
    with finite_backward(key_value[0].shape[2], mask is not None):
        return read(query_BHQK, *key_value, mask)


def finite_backward(n_keys: int, has_mask: bool) -> contextlib.AbstractContextManager[None]:
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

    On an H100 with torch 2.11 a plan took 47 to 78 ms forward and 55 to 89 backward, of the processor's time
    (RESULTS.md): more than a step, where the number of rows or their length often is another.
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


class SelfAttention(BartAttention):
    """Identical to BartAttention except: PyTorch computes it `without_cudnn`.

    Here and not around the decoder, for a checkpointed layer is computed again without what is around it.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As BartAttention's."""
        with without_cudnn():
            return super().forward(hidden_states, *args, **kwargs)


class CrossAttention(BartAttention):
    """Identical to BartAttention except: contexts of different lengths, padded or packed, and `without_cudnn`.

    Padded ones flash attention reads rightly too. Of packed ones (see `Packing`) keys and values are projected together
    and each group is read by itself.
    """

    def __init__(self, config: RecurrentBartConfig, layer_idx: int):
        super().__init__(
            embed_dim=config.d_model,
            num_heads=config.decoder_attention_heads,
            dropout=config.attention_dropout,
            is_decoder=True,
            config=config,
            layer_idx=layer_idx,
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: Tensor | None = None,
        n_memory: int = 0,
        packed: tuple[Packing, Sequence[Tensor]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As BartAttention's.

        Args:
            hidden_states: See BartAttention, for the others too.
            n_memory: Number M of memory positions at the head of each context.
            packed: How `key_value_states` are packed, and masks of the groups; weights are not given then.
        """
        query = split_heads(self, self.q_proj(hidden_states))
        key_value = self._cached_key_value(key_value_states, past_key_values)
        with without_cudnn():
            if packed is None:
                values, weights = self._read(query, key_value, attention_mask, n_memory)
            else:
                values, weights = self._read_groups(query, key_value, *packed, n_memory), None
        return self.out_proj(values.flatten(2)), weights

    def _read_groups(
        self, query: Tensor, key_value: KeyValue, packing: Packing, masks: Sequence[Tensor], n_memory: int
    ) -> Tensor:
        """What is read of contexts that are packed, by queries in their order."""
        queries = query.split([n_rows for n_rows, _ in packing.sizes])
        # (1, H, m, A, K) of each group
        keys, values = ([it.squeeze(0).transpose(0, 1) for it in packing.unpack(part, dim=2)] for part in key_value)
        groups = zip(queries, zip(keys, values, strict=True), masks, strict=True)
        return torch.cat([self._read(*group, n_memory)[0] for group in groups])

    def _read(self, query: Tensor, key_value: KeyValue, mask: Tensor | None, n_memory: int) -> Read:
        return attend(self, query, key_value, mask)

    def _cached_key_value(self, key_value_states: Tensor, past_key_values: EncoderDecoderCache | None) -> KeyValue:
        """Keys and values `(B, H, A, K)`, projected once per document while it is decoded."""
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return cached.keys, cached.values
        key = split_heads(self, self.k_proj(key_value_states))
        value = split_heads(self, self.v_proj(key_value_states))
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value


class GatedCrossAttention(CrossAttention):
    """Identical to CrossAttention except: the first `n_memory` positions attended to have a softmax of their own.

    What is read of them is added through `memory_gate`, one per head, zero at first: until it opens, the decoder is
    BART's.
    """

    def __init__(self, config: RecurrentBartConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory_gate = nn.Parameter(torch.empty(config.decoder_attention_heads))

    def _read(self, query: Tensor, key_value: KeyValue, mask: Tensor | None, n_memory: int) -> Read:
        key, value = key_value
        memory_mask = mask
        if mask is not None:
            memory_mask, mask = mask[..., :n_memory], mask[..., n_memory:]
        read = super()._read(query, (key[:, :, n_memory:], value[:, :, n_memory:]), mask, 0)
        if not n_memory:
            return read
        memory = key[:, :, :n_memory], value[:, :, :n_memory]
        return gated_read(read, attend(self, query, memory, memory_mask), self.memory_gate.unsqueeze(0))
