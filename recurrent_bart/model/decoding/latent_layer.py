"""Layer of a decoder for one position per call that attends to encoder outputs, for long contexts on a GPU."""

# Shape suffixes: R texts of all documents, B documents, A attended length, D model width.

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.model.decoding.cached_layer import CacheShape, Visible
from recurrent_bart.model.decoding.fused_layer import FusedLayer, context_mask, is_plain_linear

# share of the GPU's memory from which keys and values of all layers are not stored. Below it, layers keep them,
# because the speed of this layer was not measured
MEMORY_SHARE = 1 / 3
# most queries of a document, texts times heads; each 32 of them read the encoder outputs once more
MOST_QUERIES = 64
# model widths and types of weights that the kernel's tiles have room for
WIDTHS = (512, 768, 1024)
DTYPES = (torch.bfloat16, torch.float16)


def can_read_latents(decoder: Any, shape: CacheShape, like: Tensor) -> bool:
    """Return True if a fused decoder attends to encoder outputs: keys and values would need much memory."""
    from recurrent_bart.execution.kernels.latent_attention import LEAST_SHARED_KIB, shared_kib

    cross = [layer.encoder_attn for layer in decoder.layers]
    n_positions = shape.n_documents * (shape.n_context - shape.n_memory)
    n_bytes = 2 * len(cross) * n_positions * decoder.config.d_model * like.element_size()
    return (
        n_bytes >= MEMORY_SHARE * memory_bytes(like.device)
        and like.dtype in DTYPES
        and shared_kib(like.device) >= LEAST_SHARED_KIB
        and all(part.embed_dim in WIDTHS and shape.n_texts * part.num_heads <= MOST_QUERIES for part in cross)
        and all(is_plain_linear(projection) for part in cross for projection in (part.k_proj, part.v_proj))
    )


def memory_bytes(device: torch.device) -> float:
    """Return the size of a GPU's memory; no limit on other devices, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class LatentLayer(FusedLayer):
    """Layer whose tokens' keys and values are never computed: its queries and outputs are multiplied by their weights.

    All layers read the same encoder outputs, `visible.context`. Only the state has keys and values.
    """

    def __init__(self, layer: Any, shape: CacheShape, like: Tensor):
        super().__init__(layer, replace(shape, n_context=shape.n_memory), like)

    def _project_context(self, context_BAD: Tensor) -> None:
        if self.shape.n_memory:
            super()._project_context(context_BAD[:, : self.shape.n_memory])

    def _read_tokens(self, query_RD: Tensor, visible: Visible) -> Tensor:
        from recurrent_bart.execution.kernels.latent_attention import attend_to_latents

        assert visible.context is not None
        cross = self.layer.encoder_attn
        key, value = cross.k_proj, cross.v_proj
        weights = key.weight, value.weight, value.bias
        mask, end = context_mask(visible, 1)
        return attend_to_latents(query_RD, visible.context, *weights, cross.num_heads, cross.scaling, mask, end)
