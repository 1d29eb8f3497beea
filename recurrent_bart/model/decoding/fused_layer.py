"""Layer of a decoder for one position per call, computed by fused kernels on a GPU."""

# Shape suffixes: R texts of all documents, D model width.

import importlib.util
import traceback
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.utils import logging

from recurrent_bart.model.decoder_attention import GatedCrossAttention
from recurrent_bart.model.decoding.cached_layer import CachedLayer, CacheShape, Projection, Visible, is_plain
from recurrent_bart.recurrence.attention import gated_read

logger = logging.get_logger(__name__)

# most rows of the kernels' products, whole and in parts; the products that PyTorch chooses are as fast for more rows
MOST_ROWS, MOST_PARTED_ROWS = 64, 128
# fewest input columns of a part of a product, and most parts
LEAST_PART, MOST_PARTS = 256, 8
# most texts of a document, and of a cache
MOST_TEXTS = 16
# types of weights that the kernels multiply
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# decoders whose kernels could not be compiled or launched
_failed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def can_fuse(decoder: Any, shape: CacheShape, like: Tensor) -> bool:
    """Return True if the kernels support the decoder: on a GPU, with plain weights and norms of one of `DTYPES`."""
    return (
        like.is_cuda
        and decoder not in _failed
        and max(shape.n_texts, shape.n_sharing) <= MOST_TEXTS
        and importlib.util.find_spec("triton") is not None
        and like.dtype in DTYPES
        and all(part.dtype == like.dtype for part in decoder.layers.parameters())
        and all(_is_plain_layer(layer) for layer in decoder.layers)
    )


def has_failed(decoder: nn.Module, error: Exception) -> bool:
    """Return True if an error comes from Triton. In that case, use no kernels for the decoder from now on."""
    modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    may_fall_back = decoder not in _failed and not isinstance(error, torch.OutOfMemoryError)
    is_of_triton = may_fall_back and any(name.partition(".")[0] == "triton" for name in modules)
    if is_of_triton:
        _failed.add(decoder)
        logger.warning_once(f"generate: steps run without fused kernels, which is slower; Triton failed: {error}")
    return is_of_triton


def _is_plain_layer(layer: Any) -> bool:
    own, cross = layer.self_attn, layer.encoder_attn
    projections = own.q_proj, own.k_proj, own.v_proj, own.out_proj, cross.q_proj, cross.out_proj, layer.fc1, layer.fc2
    norms = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm
    return all(is_plain_linear(part) for part in projections) and all(
        type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.bias is not None for norm in norms
    )


def is_plain_linear(part: Any) -> bool:
    """Return True if a module is a linear map with a plain contiguous weight and a bias."""
    return is_plain(part, nn.Linear) and part.bias is not None and part.weight.is_contiguous()


def context_mask(visible: Visible, number: int) -> tuple[Tensor | None, Tensor | None]:
    """Return mask `(B, A)` and end of the state (0) or of the tokens (1)."""
    mask = visible.context_masks[number]
    return None if mask is None else mask[:, 0, 0], visible.context_ends[number]


class FusedLayer(CachedLayer):
    """Layer whose products, attention, residual sums and norms are kernels; results differ by rounding only."""

    def __init__(self, layer: Any, shape: CacheShape, like: Tensor):
        super().__init__(layer, shape, like)
        activation = layer.activation_fn
        # the exact GELU, not the tanh approximation
        self.has_gelu = isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu
        # position by position, as the projection writes them
        n_heads, head_width = self.context_kv.shape[2], self.context_kv.shape[4]
        kept = like.new_zeros(2, shape.n_documents, shape.n_context, n_heads, head_width)
        self.context_kv = kept.transpose(2, 3)
        own = layer.encoder_attn
        self.has_plain_context = all(is_plain_linear(part) for part in (own.k_proj, own.v_proj))

    def _project_context(self, context_BAD: Tensor) -> None:
        """Project into the cache without a copy if the context has the cache's length."""
        n_documents, n_context, width = context_BAD.shape
        if n_context != self.context_kv.shape[3] or not self.has_plain_context:
            super()._project_context(context_BAD)
            return
        cross = self.layer.encoder_attn
        for buffer, projection in zip(self.context_kv, (cross.k_proj, cross.v_proj), strict=True):
            kept = buffer.transpose(1, 2).view(n_documents * n_context, -1)
            torch.addmm(projection.bias, context_BAD.reshape(-1, width), projection.weight.T, out=kept)

    def step(self, hidden_RD: Tensor, visible: Visible) -> Tensor:
        """Return the layer's output for one position of each text."""
        layer, is_pre_norm = self.layer, self.is_pre_norm
        normed_RD = layer.self_attn_layer_norm(hidden_RD) if is_pre_norm else hidden_RD
        read_RD = self._read_text(normed_RD, visible)
        after_text = layer.encoder_attn_layer_norm if is_pre_norm else layer.self_attn_layer_norm
        normed_RD, hidden_RD = self._add_block(self.own_out, read_RD, hidden_RD, after_text)
        read_RD = self._read_context(normed_RD, visible)
        after_context = layer.final_layer_norm if is_pre_norm else layer.encoder_attn_layer_norm
        normed_RD, hidden_RD = self._add_block(self.cross_out, read_RD, hidden_RD, after_context)
        inner = self._multiply(self.widen, normed_RD, self.has_gelu)
        inner = inner if self.has_gelu else layer.activation_fn(inner)
        if is_pre_norm:
            return hidden_RD + self._multiply(self.narrow, inner)
        return self._add_block(self.narrow, inner, hidden_RD, layer.final_layer_norm)[0]

    def _read_text(self, hidden_RD: Tensor, visible: Visible) -> Tensor:
        from recurrent_bart.execution.kernels.step_attention import attend_to_text

        scale = self.layer.self_attn.scaling
        query_key_value = self._multiply(self.query_key_value, hidden_RD)
        return attend_to_text(query_key_value, self.own_kv, visible.position, visible.ancestor, scale)

    def _read_context(self, hidden_RD: Tensor, visible: Visible) -> Tensor:
        cross, n_memory = self.layer.encoder_attn, self.shape.n_memory
        query_RD = self._multiply(self.cross_query, hidden_RD)
        tokens_RD = self._read_tokens(query_RD, visible)
        if not n_memory:
            return tokens_RD
        assert isinstance(cross, GatedCrossAttention)
        heads = 1, -1, cross.num_heads, cross.head_dim
        memory_RD = self._read_keys(query_RD, slice(n_memory), *context_mask(visible, 0))
        parts = (tokens_RD.view(heads), None), (memory_RD.view(heads), None)
        return gated_read(*parts, cross.memory_gate.unsqueeze(0))[0].reshape(query_RD.shape)

    def _read_tokens(self, query_RD: Tensor, visible: Visible) -> Tensor:
        """Return the attention output `(R, D)` of the context without the state."""
        return self._read_keys(query_RD, slice(self.shape.n_memory, None), *context_mask(visible, 1))

    def _read_keys(self, query_RD: Tensor, places: slice, mask: Tensor | None, end: Tensor | None) -> Tensor:
        from recurrent_bart.execution.kernels.step_attention import attend_to_context

        key, value = self.context_kv[:, :, :, places]
        return attend_to_context(query_RD, key, value, mask, end, self.layer.encoder_attn.scaling)

    def _multiply(self, projection: Projection, rows: Tensor, has_gelu: bool = False) -> Tensor:
        """Return the product with the weights plus the bias, through GELU if asked."""
        if len(rows) <= MOST_ROWS:
            from recurrent_bart.execution.kernels.row_linear import linear_rows

            return linear_rows(rows, projection.weight, projection.bias, has_gelu)
        product = projection(rows)
        return nn.functional.gelu(product) if has_gelu else product

    def _add_block(
        self, projection: Projection, rows: Tensor, residual_RD: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """Add a block's output to the residual stream. Return the stream's norm, and what the next sum is added to."""
        from recurrent_bart.execution.kernels.row_linear import add_and_norm, linear_parts

        if len(rows) <= MOST_PARTED_ROWS:
            n_parts = max(1, min(MOST_PARTS, rows.shape[1] // LEAST_PART))
            parts = linear_parts(rows, projection.weight, n_parts)
        else:
            parts = nn.functional.linear(rows, projection.weight).unsqueeze(0)
        affine = norm.weight, norm.bias, norm.eps
        return add_and_norm(parts, projection.bias, residual_RD, *affine, gives_sum=self.is_pre_norm)
