"""Decoder that computes one position per call, with all keys and values in buffers of fixed size.

A step does not synchronize and allocates nothing that lasts, so it runs eagerly and inside a CUDA graph.
Shape suffixes: B documents, S texts of a document, G texts that share a self-attention cache, R texts of all documents,
H heads, K head width, T target length, A attended length, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from recurrent_bart.model.decoder_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.model.modeling_decoder import PreNormDecoderLayer
from recurrent_bart.model.token_head import PLAIN_WEIGHTS, TokenHead
from recurrent_bart.recurrence.attention import gated_read, split_heads, without_cudnn


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


class CachedDecoder:
    """Decoder of a model with buffers for keys and values; `step` returns the scores of the next tokens.

    Trained weights are never stale: the only copies of weights are made anew by each `load`.
    """

    def __init__(self, model: Any, shape: CacheShape, like: Tensor):
        """Allocate buffers of the dtype and on the device of `like`."""
        self.decoder, self.head, self.bias = model.model.decoder, model.lm_head, model.final_logits_bias
        self.shape = shape
        self.layers = [CachedLayer(layer, shape, like) for layer in self.decoder.layers]
        # masks of state and tokens, apart: attention kernels need masks that begin at an aligned address
        lengths = shape.n_memory, shape.n_context - shape.n_memory
        masks = [like.new_zeros(shape.n_documents, 1, 1, length) for length in lengths]
        self.context_masks: list[Tensor] | list[None] = masks if shape.is_padded else [None, None]
        self._is_plain_head = is_plain(self.head, nn.Linear, TokenHead) and self.head.bias is None

    def load(self, context_BAD: Tensor, mask_BA: Tensor | None) -> None:
        """Project the contexts' keys and values, and copy the current weights that are multiplied as one."""
        n_context = context_BAD.shape[1]
        for layer in self.layers:
            layer.load(context_BAD)
        if not self.shape.is_padded:
            return
        seen_BA = torch.ones_like(context_BAD[..., 0], dtype=torch.bool) if mask_BA is None else mask_BA.bool()
        seen_BA = nn.functional.pad(seen_BA, (0, self.shape.n_context - n_context), value=False)
        parts = seen_BA[:, : self.shape.n_memory], seen_BA[:, self.shape.n_memory :]
        for mask, seen in zip(self.context_masks, parts, strict=True):
            assert mask is not None
            mask.zero_().masked_fill_(~seen[:, None, None], -torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Keep the contexts and texts of the documents with these indices alone."""
        self.shape = replace(self.shape, n_documents=len(rows))
        for layer in self.layers:
            layer.keep(rows)
        masks = [None if mask is None else mask[rows] for mask in self.context_masks]
        self.context_masks = cast("list[Tensor] | list[None]", masks)

    def step(self, token_R: Tensor, position: Tensor, n_keys: int, mask: Tensor | None) -> Tensor:
        """Return the scores `(R, V)` after one more token per text, in float32.

        Args:
            token_R: Ids of the tokens at `position`.
            position: Number of tokens before these, `(1,)`, on the device.
            n_keys: Number of cached positions to attend to.
            mask: Additive mask `(B or 1, 1, G, n_keys * G)`, position by position; None: all are visible.
        """
        return self._score(self.read(token_R, position, n_keys, mask))

    @without_cudnn()
    def read(self, token_R: Tensor, position: Tensor, n_keys: int, mask: Tensor | None) -> Tensor:
        """Return the last layer's output `(R, D)`; see `step`."""
        decoder = self.decoder
        positions_1D = decoder.embed_positions(None, position_ids=position).squeeze(0)
        hidden_RD = decoder.layernorm_embedding(decoder.embed_tokens(token_R) + positions_1D)
        for layer in self.layers:
            hidden_RD = layer.step(hidden_RD, position, n_keys, mask, self.context_masks)
        return hidden_RD if decoder.layer_norm is None else decoder.layer_norm(hidden_RD)

    def _score(self, hidden_RD: Tensor) -> Tensor:
        if self._is_plain_head:
            return linear(hidden_RD, self.head.weight, self.bias[0].to(hidden_RD)).float()
        return (self.head(hidden_RD) + self.bias).float()

    def n_bytes(self) -> int:
        """Return the size of all caches and copied weights."""
        caches = sum(part.nbytes for layer in self.layers for part in (layer.own_kv, layer.context_kv))
        return caches + sum(layer.query_key_value.n_bytes() for layer in self.layers)


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
        cross, n_context = self.layer.encoder_attn, context_BAD.shape[1]
        for buffer, projection in zip(self.context_kv, (cross.k_proj, cross.v_proj), strict=True):
            buffer[:, :, :n_context].copy_(split_heads(cross, projection(context_BAD)))
            buffer[:, :, n_context:].zero_()
        self.own_kv.zero_()
        self.query_key_value.load()

    def keep(self, rows: Tensor) -> None:
        """Keep the documents with these indices alone. All texts of a document share one cache."""
        self.own_kv, self.context_kv = self.own_kv[:, rows], self.context_kv[:, rows]

    def step(
        self,
        hidden_RD: Tensor,
        position: Tensor,
        n_keys: int,
        mask: Tensor | None,
        context_masks: list[Tensor] | list[None],
    ) -> Tensor:
        """Return the layer's output for one position of each text."""
        layer = self.layer

        def attend_to_text(hidden_RD: Tensor) -> Tensor:
            return self._attend_to_text(hidden_RD, position, n_keys, mask)

        def attend_to_context(hidden_RD: Tensor) -> Tensor:
            return self._attend_to_context(hidden_RD, *context_masks)

        def feed_forward(hidden_RD: Tensor) -> Tensor:
            return self.narrow(layer.activation_fn(self.widen(hidden_RD)))

        hidden_RD = self._add(layer.self_attn_layer_norm, attend_to_text, hidden_RD)
        hidden_RD = self._add(layer.encoder_attn_layer_norm, attend_to_context, hidden_RD)
        return self._add(layer.final_layer_norm, feed_forward, hidden_RD)

    def _add(self, norm: nn.Module, block: Callable[[Tensor], Tensor], hidden_RD: Tensor) -> Tensor:
        if self.is_pre_norm:
            return hidden_RD + block(norm(hidden_RD))
        return norm(hidden_RD + block(hidden_RD))

    def _attend_to_text(self, hidden_RD: Tensor, position: Tensor, n_keys: int, mask: Tensor | None) -> Tensor:
        own: SelfAttention = self.layer.self_attn
        shape = -1, self.shape.n_sharing, 3, own.num_heads, own.head_dim
        query, *key_value = self.query_key_value(hidden_RD).view(shape).permute(2, 0, 3, 1, 4).split([1, 2])
        self.own_kv.index_copy_(3, position, key_value[0].unsqueeze(3))
        # positions, and within a position the texts that share the cache: a view
        key, value = self.own_kv[:, :, :, :n_keys].flatten(3, 4)
        return self.own_out(_attend(own, query.squeeze(0), key, value, mask).reshape(hidden_RD.shape))

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
