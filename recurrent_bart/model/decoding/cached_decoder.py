"""Decoder that computes one position per call, with all keys and values in buffers of fixed size.

A step does not synchronize and allocates nothing that lasts, so it runs eagerly and inside a CUDA graph.
Shape suffixes: B documents, R texts of all documents, A attended length, D model width, V vocabulary.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

from recurrent_bart.model.decoding.cached_layer import CachedLayer, CacheShape, Visible, is_plain, linear
from recurrent_bart.model.decoding.fused_layer import FusedLayer, can_fuse
from recurrent_bart.model.decoding.latent_layer import LatentLayer, can_read_latents
from recurrent_bart.model.token_head import TokenHead
from recurrent_bart.recurrence.attention import without_cudnn


class CachedDecoder:
    """Decoder of a model with buffers for keys and values; `step` returns the scores of the next tokens.

    The decoder never uses outdated weights: each `load` copies again what is copied at all.
    """

    def __init__(self, model: Any, shape: CacheShape, like: Tensor):
        """Allocate buffers of the dtype and on the device of `like`."""
        self.decoder, self.head, self.bias = model.model.decoder, model.lm_head, model.final_logits_bias
        self.shape = shape
        self.is_fused = can_fuse(self.decoder, shape, like)
        self.reads_latents = self.is_fused and can_read_latents(self.decoder, shape, like)
        layer_class = LatentLayer if self.reads_latents else FusedLayer if self.is_fused else CachedLayer
        self.layers = [layer_class(layer, shape, like) for layer in self.decoder.layers]
        n_tokens = shape.n_context - shape.n_memory
        # encoder outputs of the tokens, which all layers read
        self.context_BAD: Tensor | None = None
        if self.reads_latents:
            self.context_BAD = like.new_zeros(shape.n_documents, n_tokens, model.config.d_model)
        # masks of state and tokens, apart: attention kernels need masks that begin at an aligned address
        lengths = shape.n_memory, n_tokens
        masks = [like.new_zeros(shape.n_documents, 1, 1, length) for length in lengths]
        self.context_masks: list[Tensor] | list[None] = masks if shape.is_padded else [None, None]
        # number of positions up to the last visible one
        self.context_ends: list[Tensor] | list[None] = [None, None]
        if shape.is_padded:
            self.context_ends = [like.new_zeros(shape.n_documents, dtype=torch.int32) for _ in lengths]
        self._is_plain_head = is_plain(self.head, nn.Linear, TokenHead) and self.head.bias is None

    def load(self, context_BAD: Tensor, mask_BA: Tensor | None) -> None:
        """Project the contexts' keys and values, and copy the current weights that are multiplied as one."""
        n_context = context_BAD.shape[1]
        for layer in self.layers:
            layer.load(context_BAD)
        if self.context_BAD is not None:
            n_tokens = n_context - self.shape.n_memory
            self.context_BAD[:, :n_tokens].copy_(context_BAD[:, self.shape.n_memory :])
            self.context_BAD[:, n_tokens:].zero_()
        if not self.shape.is_padded:
            return
        seen_BA = torch.ones_like(context_BAD[..., 0], dtype=torch.bool) if mask_BA is None else mask_BA.bool()
        seen_BA = nn.functional.pad(seen_BA, (0, self.shape.n_context - n_context), value=False)
        parts = seen_BA[:, : self.shape.n_memory], seen_BA[:, self.shape.n_memory :]
        for mask, end, seen in zip(self.context_masks, self.context_ends, parts, strict=True):
            assert mask is not None
            assert end is not None
            mask.zero_().masked_fill_(~seen[:, None, None], -torch.inf)
            number = torch.arange(1, seen.shape[1] + 1, device=seen.device)
            end.copy_((seen * number).amax(dim=1) if seen.shape[1] else end.zero_())

    def keep(self, rows: Tensor) -> None:
        """Keep the contexts and texts of the documents with these indices alone."""
        self.shape = replace(self.shape, n_documents=len(rows))
        for layer in self.layers:
            layer.keep(rows)
        self.context_BAD = None if self.context_BAD is None else self.context_BAD[rows]
        for name in ("context_masks", "context_ends"):
            parts = [None if part is None else part[rows] for part in getattr(self, name)]
            setattr(self, name, cast("list[Tensor] | list[None]", parts))

    def step(self, token_R: Tensor, visible: Visible) -> Tensor:
        """Return the scores `(R, V)` after one more token per text, in float32.

        Args:
            token_R: Ids of the tokens at `visible.position`.
            visible: Positions of the text that the tokens see.
        """
        return self._score(self.read(token_R, visible))

    @without_cudnn()
    def read(self, token_R: Tensor, visible: Visible) -> Tensor:
        """Return the last layer's output `(R, D)`; see `step`."""
        decoder = self.decoder
        visible = replace(visible, context_masks=self.context_masks, context_ends=self.context_ends)
        visible = replace(visible, context=self.context_BAD)
        hidden_RD = self._embed(token_R, visible.position)
        for layer in self.layers:
            hidden_RD = layer.step(hidden_RD, visible)
        return hidden_RD if decoder.layer_norm is None else decoder.layer_norm(hidden_RD)

    def _embed(self, token_R: Tensor, position: Tensor) -> Tensor:
        decoder = self.decoder
        tokens, positions, norm = decoder.embed_tokens, decoder.embed_positions, decoder.layernorm_embedding
        is_plain_norm = type(norm) is nn.LayerNorm and norm.bias is not None
        if self.is_fused and is_plain(tokens, BartScaledWordEmbedding) and is_plain_norm:
            from recurrent_bart.execution.kernels.step_tokens import embed_tokens

            weights = tokens.weight.contiguous(), positions.weight[positions.offset :].contiguous()
            return embed_tokens(token_R, position, *weights, tokens.embed_scale, norm.weight, norm.bias, norm.eps)
        return norm(tokens(token_R) + positions(None, position_ids=position).squeeze(0))

    def _score(self, hidden_RD: Tensor) -> Tensor:
        if not self._is_plain_head:
            return (self.head(hidden_RD) + self.bias).float()
        bias_V = self.bias[0].to(hidden_RD)
        if self.is_fused and self.head.weight.is_contiguous():
            from recurrent_bart.execution.kernels.row_linear import linear_scores

            return linear_scores(hidden_RD, self.head.weight, bias_V)
        return linear(hidden_RD, self.head.weight, bias_V).float()

    def n_bytes(self) -> int:
        """Return the size of all caches and copied weights."""
        caches = sum(part.nbytes for layer in self.layers for part in (layer.own_kv, layer.context_kv))
        n_shared = 0 if self.context_BAD is None else self.context_BAD.nbytes
        return caches + n_shared + sum(layer.query_key_value.n_bytes() for layer in self.layers)
