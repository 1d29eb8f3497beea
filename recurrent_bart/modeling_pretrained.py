"""What all models here have in common: how their weights begin, and what is recomputed in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.models.bart.modeling_bart import BartEncoder, BartPreTrainedModel

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.prefix_attention import GatedCrossAttention
from recurrent_bart.prefix_recurrence import PrefixRecurrence

CHECKPOINTING_GRAINS = ("none", "layer", "segment")


class RecurrentBartPreTrainedModel(BartPreTrainedModel):
    """Weight initialisation, loading and gradient checkpointing for all our models."""

    config_class = RecurrentBartConfig
    config: RecurrentBartConfig
    # the prefix is read by matrix products around it, not by whole layers that a compiler could swallow
    _can_compile_fullgraph = False
    # its masks cannot be cut into memory's and tokens' part
    _supports_flex_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrefixRecurrence):
            module.init_weights(self.config.init_std, self.config.matrix_gate_init)
        if isinstance(module, GatedCrossAttention):
            init.zeros_(module.memory_gate)

    def set_gradient_checkpointing(self, grain: str) -> None:
        """Choose what is recomputed in the backward pass to save memory; losses and gradients stay the same.

        Args:
            grain: `"none"`; `"layer"`: each layer of a segment for itself; `"segment"`: in the encoder all layers of a
                segment together, of which the state alone is stored, in the decoder each layer. By diagonals, in the
                encoder: `"layer"`: each diagonal for itself, of which streams and states are stored; `"segment"`: as
                many together as makes the whole smallest.

        Raises:
            ValueError: It is none of these.
        """
        if grain not in CHECKPOINTING_GRAINS:
            raise ValueError(f"gradient checkpointing {grain!r}: allowed are {', '.join(CHECKPOINTING_GRAINS)}")
        self._set_gradient_checkpointing(grain != "none", functools.partial(checkpoint, use_reentrant=False))
        for encoder in (module for module in self.modules() if isinstance(module, BartEncoder)):
            encoder.checkpoints_segments = grain == "segment"
            for layer in encoder.layers:
                layer.gradient_checkpointing = grain == "layer"

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Refuse the reentrant kind, on whatever way it was asked for.

        A layer is run once per segment, and reentrant checkpointing gives wrong gradients for modules used more than
        once.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
            raise ValueError("use_reentrant=True: gradients of layers used once per segment would be wrong; use False")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
