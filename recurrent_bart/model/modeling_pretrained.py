"""Base class of all Recurrent BART models: weight initialization, loading and gradient checkpointing."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.models.bart.modeling_bart import BartEncoder, BartPreTrainedModel

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.decoder_attention import GatedCrossAttention
from recurrent_bart.model.peft_adapters import save_recurrence, use_barts_targets
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence

CHECKPOINTING_GRAINS = ("none", "layer", "segment")
# weights of MBart that BART lacks; all other names are the same
FINAL_NORM = re.compile(r"(^|\.)(encoder|decoder)\.layer_norm\.")


class RecurrentBartPreTrainedModel(BartPreTrainedModel):
    """Base class with weight initialization, loading and gradient checkpointing."""

    config_class = RecurrentBartConfig
    config: RecurrentBartConfig
    # units for FSDP and accelerate's device maps: the sequential schedule calls each layer as a module
    _no_split_modules = ("RecurrentBartEncoderLayer", "BartDecoderLayer")
    # matrix products outside the layers read the prefix, so a compiler cannot compile each layer as a whole
    _can_compile_fullgraph = False
    # flex attention's masks cannot be split into state and token parts
    _supports_flex_attn = False

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        use_barts_targets()

    def post_init(self) -> None:
        """Finish the construction; see PreTrainedModel."""
        if self.config.normalize_before:
            self._no_split_modules = ("RecurrentBartEncoderLayer", "PreNormDecoderLayer")
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load weights of Recurrent BART, plain BART or MBart; see PreTrainedModel.

        Raises:
            ValueError: The weights have another layout than the configuration names.
        """
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        norms = {kind: sorted(filter(FINAL_NORM.search, report[f"{kind}_keys"])) for kind in ("unexpected", "missing")}
        if norms["unexpected"]:
            raise ValueError(
                f"the checkpoint has {', '.join(norms['unexpected'])}, but BART has no norm after the last layer. The "
                "weights belong to mBART or a similar model with a norm before each layer, although the configuration "
                "names BART"
            )
        if norms["missing"]:
            raise ValueError(
                f"the checkpoint lacks {', '.join(norms['missing'])}, but MBart has a norm after the last layer. The "
                "weights belong to BART or a similar model with a norm after each layer, although the configuration "
                "names MBart"
            )
        return (model, report) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing; see `RecurrentBartConfig.register_for_auto_class`."""

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations of PEFT's adapters by name; AttributeError without adapters."""
        if "_peft_config" not in self.__dict__:
            raise AttributeError("peft_config: the model has no adapters")
        return self.__dict__["_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        # PEFT sets this attribute once adapters are in place
        self.__dict__["_peft_config"] = configs
        save_recurrence(self, configs)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["_peft_config"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrefixRecurrence):
            module.init_weights(self.config.init_std, self.config.matrix_gate_init)
        if isinstance(module, GatedCrossAttention):
            init.zeros_(module.memory_gate)

    def set_gradient_checkpointing(self, grain: str) -> None:
        """Choose what the backward pass recomputes to save memory; losses and gradients stay the same.

        `grain` is `"none"`, `"layer"` or `"segment"`, else ValueError. The decoder recomputes each layer separately.

        - Sequential encoder: `"layer"` recomputes each layer separately; `"segment"` recomputes all layers of a segment
        together and stores only the state.
        - Wavefront encoder: `"layer"` recomputes one diagonal at a time; `"segment"` recomputes several consecutive
        diagonals at a time, and chooses their number so that peak memory is lowest.
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
        """Turn non-reentrant checkpointing of each layer on or off; every request for checkpointing calls this.

        Raise ValueError for reentrant checkpointing, because it gives wrong gradients for layers that run more than
        once, and here each layer runs once per segment.
        """
        chosen = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and chosen.get("use_reentrant"):
            raise ValueError("use_reentrant=True: gradients of layers used once per segment would be wrong; use False")
        if enable and chosen.get("use_reentrant") is None:
            # the default of torch.utils.checkpoint is reentrant
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for encoder in (module for module in self.modules() if isinstance(module, BartEncoder)):
            encoder.checkpoints_segments = False
