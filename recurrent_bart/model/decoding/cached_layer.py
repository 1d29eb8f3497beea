"""Layer of a decoder that computes one position per call, with keys and values in buffers of fixed size.

Shape suffixes: B documents, S texts of a document, G texts that share a self-attention cache, R texts of all documents,
H heads, K head width, T target length, A attended length, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.model.decoder_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.model.modeling_decoder import PreNormDecoderLayer
from recurrent_bart.model.token_head import PLAIN_WEIGHTS
from recurrent_bart.recurrence.attention import gated_read, split_heads


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the buffers.

    Attributes:
        n_documents: Documents, B.
        n_texts: Texts per document, S; they share the keys and values of the document's context.
        n_sharing: Texts that share one self-attention cache, G: all beams of a document, or 1.
        n_positions: Target length, T.
        n_context: Attended length of the longest context, A.
        is_padded: True if some context positions are padding.
        n_memory: Leading context positions that are state and have their own softmax.
    """

    n_documents: int
    n_texts: int
    n_sharing: int
    n_positions: int
    n_context: int
    is_padded: bool
    n_memory: int


@dataclass(frozen=True)
class Visible:
    """Cached positions that a step sees.

    Attributes:
        position: Number of tokens before the new ones, `(1,)`, on the device.
        n_keys: Number of cached positions up to the new one, or more.
        mask: Additive mask `(B or 1, 1, G, n_keys * G)`, position by position; None: all are visible, or kernels run.
        ancestor: `(B, G, T)`, the text whose keys and values belong to a beam and a position; None without beams.
        context_masks: Additive masks of state and tokens, `(B, 1, 1, length)` each; None without padding.
        context_ends: Number of positions up to the last visible one of state and of tokens, `(B,)` each.
        context: Encoder outputs of the tokens, `(B, A, D)`, for layers without keys and values of them.
    """

    position: Tensor
    n_keys: int
    mask: Tensor | None
    ancestor: Tensor | None
    context_masks: Sequence[Tensor | None] = (None, None)
    context_ends: Sequence[Tensor | None] = (None, None)
    context: Tensor | None = None


class CachedLayer:
    """Layer of the decoder with its cache.

    `own_kv` are keys and values of the texts, `(2, B * S / G, H, T, G, K)`. `context_kv` are keys and values of the
    contexts, `(2, B, H, A, K)`.
    """

    def __init__(self, layer: Any, shape: CacheShape, like: Tensor):
        self.layer, self.shape = layer, shape
        self.is_pre_norm = isinstance(layer, PreNormDecoderLayer)
        own, cross = layer.self_attn, layer.encoder_attn
        n_caches = shape.n_documents * shape.n_texts // shape.n_sharing
        own_size = 2, n_caches, own.num_heads, shape.n_positions, shape.n_sharing, own.head_dim
        # a masked position still counts as 0 * value, which is not finite in uninitialized memory
        self.own_kv = like.new_zeros(own_size)
        self.context_kv = like.new_zeros(2, shape.n_documents, cross.num_heads, shape.n_context, cross.head_dim)
        self.query_key_value = Projection(own.q_proj, own.k_proj, own.v_proj)
        parts = own.out_proj, cross.q_proj, cross.out_proj, layer.fc1, layer.fc2
        self.own_out, self.cross_query, self.cross_out, self.widen, self.narrow = map(Projection, parts)

    def load(self, context_BAD: Tensor) -> None:
        """Project the context, empty the cache of the texts and copy the current weights."""
        self._project_context(context_BAD)
        self.own_kv.zero_()
        self.query_key_value.load()

    def _project_context(self, context_BAD: Tensor) -> None:
        cross, n_context = self.layer.encoder_attn, context_BAD.shape[1]
        for buffer, projection in zip(self.context_kv, (cross.k_proj, cross.v_proj), strict=True):
            buffer[:, :, :n_context].copy_(split_heads(cross, projection(context_BAD)))
            buffer[:, :, n_context:].zero_()

    def keep(self, rows: Tensor) -> None:
        """Keep the documents with these indices alone. All texts of a document share one cache."""
        self.own_kv, self.context_kv = self.own_kv[:, rows], self.context_kv[:, rows]

    def step(self, hidden_RD: Tensor, visible: Visible) -> Tensor:
        """Return the layer's output for one position of each text."""
        layer = self.layer

        def attend_to_text(hidden_RD: Tensor) -> Tensor:
            return self._attend_to_text(hidden_RD, visible)

        def attend_to_context(hidden_RD: Tensor) -> Tensor:
            return self._attend_to_context(hidden_RD, *visible.context_masks)

        def feed_forward(hidden_RD: Tensor) -> Tensor:
            return self.narrow(layer.activation_fn(self.widen(hidden_RD)))

        hidden_RD = self._add(layer.self_attn_layer_norm, attend_to_text, hidden_RD)
        hidden_RD = self._add(layer.encoder_attn_layer_norm, attend_to_context, hidden_RD)
        return self._add(layer.final_layer_norm, feed_forward, hidden_RD)

    def _add(self, norm: nn.Module, block: Callable[[Tensor], Tensor], hidden_RD: Tensor) -> Tensor:
        if self.is_pre_norm:
            return hidden_RD + block(norm(hidden_RD))
        return norm(hidden_RD + block(hidden_RD))

    def _attend_to_text(self, hidden_RD: Tensor, visible: Visible) -> Tensor:
        own: SelfAttention = self.layer.self_attn
        shape = -1, self.shape.n_sharing, 3, own.num_heads, own.head_dim
        query, *key_value = self.query_key_value(hidden_RD).view(shape).permute(2, 0, 3, 1, 4).split([1, 2])
        self.own_kv.index_copy_(3, visible.position, key_value[0].unsqueeze(3))
        # positions, and within a position the texts that share the cache: a view
        key, value = self.own_kv[:, :, :, : visible.n_keys].flatten(3, 4)
        return self.own_out(_attend(own, query.squeeze(0), key, value, visible.mask).reshape(hidden_RD.shape))

    def _attend_to_context(self, hidden_RD: Tensor, memory_mask: Tensor | None, token_mask: Tensor | None) -> Tensor:
        cross: CrossAttention = self.layer.encoder_attn
        query = split_heads(cross, self.cross_query(hidden_RD).unflatten(0, (-1, self.shape.n_texts)))
        key, value = self.context_kv
        n_memory = self.shape.n_memory
        read = _attend(cross, query, key[:, :, n_memory:], value[:, :, n_memory:], token_mask)
        if n_memory:
            assert isinstance(cross, GatedCrossAttention)
            memory_read = _attend(cross, query, key[:, :, :n_memory], value[:, :, :n_memory], memory_mask)
            read, _ = gated_read((read, None), (memory_read, None), cross.memory_gate.unsqueeze(0))
        return self.cross_out(read.reshape(hidden_RD.shape))


class Projection:
    """Linear layers of one input: one product if they are plain, else the modules' own calls."""

    def __init__(self, *parts: Any):
        self.parts = parts
        self.is_plain = all(is_plain(part, nn.Linear) and part.bias is not None for part in parts)
        # several layers are multiplied by a copy of their weights
        self.weight, self.bias = parts[0].weight, parts[0].bias
        if self.is_plain and len(parts) > 1:
            self.weight = torch.empty_like(torch.cat([part.weight for part in parts]))
            self.bias = torch.empty_like(torch.cat([part.bias for part in parts]))

    def load(self) -> None:
        """Copy the current weights of several layers."""
        if self.is_plain and len(self.parts) > 1:
            torch.cat([part.weight for part in self.parts], out=self.weight)
            torch.cat([part.bias for part in self.parts], out=self.bias)

    def n_bytes(self) -> int:
        """Return the size of the copied weights."""
        return self.weight.nbytes + self.bias.nbytes if self.is_plain and len(self.parts) > 1 else 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the concatenated outputs."""
        if self.is_plain:
            return linear(hidden, self.weight, self.bias)
        return torch.cat([part(hidden) for part in self.parts], dim=-1)


def uses_onednn() -> bool:
    """Return True if PyTorch has oneDNN's product with a bias and the user has not switched oneDNN off."""
    is_on = torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True)
    return is_on and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear map to a few rows.

    On a CPU, oneDNN's product of 2 to 32 rows is faster than the product that PyTorch chooses. `benchmarks/LOG.md` has
    the times.
    """
    is_on_cpu = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
    if is_on_cpu and len(rows) > 1 and uses_onednn():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return nn.functional.linear(rows, weight, bias)


def is_plain(module: Any, *kinds: type) -> bool:
    """Return True if a module is exactly of one of the types, and its weight is a plain tensor, not a quantized one."""
    return type(module) in kinds and type(module.weight) in PLAIN_WEIGHTS


def _attend(attention: Any, query_BHQK: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention output `(B, Q, H, K)`."""
    attend = nn.functional.scaled_dot_product_attention
    return attend(query_BHQK, key, value, attn_mask=mask, scale=attention.scaling).transpose(1, 2)
