"""Self-attention and cross-attention of the decoder; contexts of different lengths may be padded or packed.

Shape suffixes: B documents, H heads, m contexts of a group, K head width, A attended length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.models.bart.modeling_bart import BartAttention

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_outputs import Packing
from recurrent_bart.model.ragged_attention import RaggedContexts
from recurrent_bart.recurrence.attention import Read, attend, gated_read, split_heads, without_cudnn
from recurrent_bart.recurrence.prefix_recurrence import KeyValue


class SelfAttention(BartAttention):
    """BartAttention without cuDNN attention (see `without_cudnn`)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute self-attention; see BartAttention."""
        # inside the module: gradient checkpointing recomputes a layer without its surroundings
        with without_cudnn():
            return super().forward(hidden_states, *args, **kwargs)


class CrossAttention(BartAttention):
    """BartAttention for contexts that may be packed (see `Packing`), without cuDNN attention.

    Keys and values of all packed contexts are projected at once; attention runs once per group of contexts.
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
        has_padding: bool = True,
        ragged: RaggedContexts | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute cross-attention; see BartAttention. The first `n_memory` positions of each context hold the state.

        `packed` has the layout of the packed `key_value_states`, and one mask per group. With it, the
        returned attention weights are None.
        `ragged` is the layout of contexts `(1, A, D)` without padding; it replaces `packed` and the mask.
        With `has_padding=False` the mask is not used: during a capture, transformers before 5.18 builds one that hides
        nothing, and attention with a mask is slower.
        """
        if not has_padding:
            attention_mask = None
        query = split_heads(self, self.q_proj(hidden_states))
        key_value = self._cached_key_value(key_value_states, past_key_values)
        with without_cudnn():
            if ragged is not None:
                values, weights = ragged.attend(query, key_value, self.dropout if self.training else 0.0), None
            elif packed is None:
                values, weights = self._read(query, key_value, attention_mask, n_memory)
            else:
                values, weights = self._read_groups(query, key_value, *packed, n_memory), None
        return self.out_proj(values.flatten(2)), weights

    def _read_groups(
        self, query: Tensor, key_value: KeyValue, packing: Packing, masks: Sequence[Tensor], n_memory: int
    ) -> Tensor:
        queries = query.split([n_rows for n_rows, _ in packing.sizes])
        # per group: (1, H, m, A, K)
        keys, values = ([it.squeeze(0).transpose(0, 1) for it in packing.unpack(part, dim=2)] for part in key_value)
        groups = zip(queries, zip(keys, values, strict=True), masks, strict=True)
        return torch.cat([self._read(*group, n_memory)[0] for group in groups])

    def _read(self, query: Tensor, key_value: KeyValue, mask: Tensor | None, n_memory: int) -> Read:
        # flash attention is correct for padded contexts too
        return attend(self, query, key_value, mask)

    def _cached_key_value(self, key_value_states: Tensor, past_key_values: EncoderDecoderCache | None) -> KeyValue:
        """Return keys and values `(B, H, A, K)`, projected once per document during generation."""
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
    """CrossAttention with a separate softmax over the `n_memory` state positions.

    The output of this softmax is scaled by `tanh(memory_gate)`, `(H,)`, and added. The gate starts at zero; then the
    decoder equals BART's.
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
