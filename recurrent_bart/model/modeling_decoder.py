"""Decoder: attends to state and tokens, with masks that need no device synchronization."""

# Shape suffixes: B documents, T target length, D model width.

import functools
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bart.modeling_bart import BartDecoder, BartDecoderLayer
from transformers.models.mbart.modeling_mbart import MBartDecoderLayer

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.cuda_graphs import call_graphed, can_capture
from recurrent_bart.model.decoder_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput, with_final_norm
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.recurrence.segmentation import is_traced

# positions of all targets, padding included. Measured on an H200: forward and backward of BART-large's decoder and loss
# on 1,024 positions took 55 ms without CUDA graphs, limited by kernel launches on the CPU. More than 1,024 was not
# measured
MOST_TARGETS = 4_096
# limit under gradient checkpointing: CUDA graphs keep their activations instead of recomputing them
MOST_CHECKPOINTED_TARGETS = 1_024
TARGETS_STEP = 32


class PreNormDecoderLayer(MBartDecoderLayer, BartDecoderLayer):
    """BartDecoderLayer that runs MBart's `forward`; Hugging Face finds the layers of BartDecoder by their type."""


class RecurrentBartDecoder(RecurrentBartPreTrainedModel, BartDecoder):
    """BartDecoder with its own attention modules and masks, plain tuples as outputs, and CUDA graphs for short targets.

    With `normalize_before` it has MBart's layers and a norm after the last one.
    On a GPU the decoder builds the causal mask itself if none is given. CUDA graphs run in training with
    `schedule="auto"` for at most `MOST_TARGETS` positions, or `MOST_CHECKPOINTED_TARGETS` under gradient checkpointing.
    They do not recompute activations, and return a cache only with `use_cache=True`. LayerDrop and packed contexts
    disable them.
    """

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        is_gated = config.has_state and config.prefix_attention == "gated"
        for layer_idx, layer in enumerate(self.layers):
            # change the class of the existing module: a new one would draw random weights, and the same seed would give
            # another model
            layer.self_attn.__class__ = SelfAttention
            layer.encoder_attn = (GatedCrossAttention if is_gated else CrossAttention)(config, layer_idx)
            if config.normalize_before:
                layer.__class__ = PreNormDecoderLayer
        # BART has no norm after the last layer
        self.layer_norm = nn.LayerNorm(config.d_model) if config.normalize_before else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple:
        """Run the decoder; see BartDecoder. `return_dict=False` returns a plain tuple with None fields."""
        if is_traced() and return_dict is not False:
            # positional, as BartModel calls it
            parts = input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask
            return with_final_norm(super().forward(*parts, past_key_values, inputs_embeds, **kwargs), self.layer_norm)
        active = {name for name, value in kwargs.items() if value is not None and value is not False}
        decoded = None
        if attention_mask is None and past_key_values is None and "use_cache" not in active:
            if inputs_embeds is not None and encoder_hidden_states is not None and active <= {"n_memory"}:
                inputs = [inputs_embeds, encoder_hidden_states, encoder_attention_mask]
                decoded = self._recorded(inputs, kwargs.get("n_memory"))
            if decoded is None:
                attention_mask = self._causal_mask(input_ids if inputs_embeds is None else inputs_embeds)
        if decoded is not None:
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=decoded)
        else:
            output = super().forward(
                input_ids,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                inputs_embeds,
                **kwargs,
            )
            output = with_final_norm(output, self.layer_norm)
        return tuple(getattr(output, item.name) for item in fields(output)) if return_dict is False else output

    def _recorded(self, inputs: list[Tensor | None], n_memory: int | None) -> Tensor | None:
        """Return the last layer's output `(B, T, D)`, computed by CUDA graphs; None if not possible or not faster.

        `inputs` are embeddings `(B, T, D)`, the context, and the context's mask from `context_mask`.
        """
        config, (embeds, *context_inputs) = self.config, [part for part in inputs if part is not None]
        n_documents, n_targets, _ = embeds.shape
        # Round up, so that few lengths are captured. The causal mask hides positions after the last one
        n_positions = -(-n_targets // TARGETS_STEP) * TARGETS_STEP
        gives_more = config.output_attentions or config.output_hidden_states
        is_checkpointed = any(layer.gradient_checkpointing for layer in self.layers)
        most = MOST_CHECKPOINTED_TARGETS if is_checkpointed else MOST_TARGETS
        is_short = n_documents * n_positions <= most and n_positions <= config.max_position_embeddings
        # LayerDrop skips different layers in each call
        drops_layers = self.training and self.layerdrop > 0
        # the causal mask of eager attention copies a number from the CPU, which a capture refuses
        is_eager = "eager" in config._attn_implementation
        is_plain = config.schedule != "auto" or gives_more or drops_layers or is_eager or not is_short
        if is_plain or not can_capture(self, [embeds, *context_inputs]):
            return None
        padded = nn.functional.pad(embeds, (0, 0, 0, n_positions - n_targets))
        decoded = call_graphed(self, functools.partial(self._plain, n_memory), [padded, *context_inputs], n_memory)
        return decoded[:, :n_targets]

    def _plain(self, n_memory: int | None, embeds: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        # without gradient checkpointing: CUDA graphs keep only the last call's activations anyway
        settings: dict[str, Any] = {"use_cache": False, "has_padding": mask is not None}
        settings |= {} if n_memory is None else {"n_memory": n_memory}
        # do not set the attribute on other layers: a CUDA graph's key contains the layers' attributes
        checkpointed = [layer for layer in self.layers if layer.gradient_checkpointing]
        try:
            for layer in checkpointed:
                layer.gradient_checkpointing = False
            own_mask = self._causal_mask(embeds)
            output = super().forward(None, own_mask, hidden, mask, None, embeds, **settings)
            return with_final_norm(output, self.layer_norm).last_hidden_state
        finally:
            for layer in checkpointed:
                layer.gradient_checkpointing = True

    def context_mask(self, encoder_outputs: RecurrentEncoderOutput) -> Tensor | None:
        """Return the context's padding mask, or None without padding; BartDecoder would wait for the GPU here."""
        if encoder_outputs.has_padding is False:
            return None
        return self._bidirectional_mask(encoder_outputs.last_hidden_state, encoder_outputs.context_mask)

    def packed_masks(self, encoder_outputs: RecurrentEncoderOutput) -> list[Tensor]:
        """Return the padding mask of each group of packed contexts; see `context_mask`."""
        groups = encoder_outputs.groups()
        return [self._bidirectional_mask(group.last_hidden_state, group.context_mask) for group, _ in groups]

    def _bidirectional_mask(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return create_bidirectional_mask(self.config, hidden[:, :1], mask, hidden, allow_is_bidirectional_skip=False)

    def _causal_mask(self, inputs: Tensor | None) -> Tensor | None:
        # the mask that BartDecoder builds would wait for the GPU
        if inputs is None or inputs.device.type == "cpu" or "flash" in self.config._attn_implementation:
            return None
        query = self.layernorm_embedding.weight.new_empty(1, inputs.shape[1], 1, device=inputs.device)
        return create_causal_mask(self.config, query, None, None, allow_is_causal_skip=False)
