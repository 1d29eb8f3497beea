"""The decoder: it reads memory and tokens, behind masks for which it need not wait for the device."""

import functools
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bart.modeling_bart import BartDecoder

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.cuda_graphs import call_graphed, can_capture
from recurrent_bart.model.decoder_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.recurrence.segmentation import is_traced

# positions of all targets, padding among them. On an H200, BART-large's decoder and loss on 1,024 of them took 55 ms,
# forward and backward, launched one by one, all of it the processor's time; more than 1,024 was not measured
MOST_TARGETS = 4_096
# where it is checkpointed, for what a recorded decoder keeps is not computed again
MOST_CHECKPOINTED_TARGETS = 1_024
TARGETS_STEP = 32


class RecurrentBartDecoder(RecurrentBartPreTrainedModel, BartDecoder):
    """Identical to BartDecoder except: its attention, its masks, plain tuples, and CUDA graphs of few targets.

    Attention is `SelfAttention` and `CrossAttention`, with `prefix_attention="gated"` to memory through a gate. On a
    GPU it makes its own mask where none is given. A plain tuple has all fields, also those that are None.

    In training with `schedule="auto"`, whole targets of at most `MOST_TARGETS` positions, or of
    `MOST_CHECKPOINTED_TARGETS` where it is checkpointed, are recorded and replayed, unless layers are dropped or
    contexts packed. They are not computed again, and give a cache only where `use_cache=True` asks for one.
    """

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        is_gated = config.has_state and config.prefix_attention == "gated"
        for layer_idx, layer in enumerate(self.layers):
            # the one that there is, for another would draw its weights first: the same seed would give another model
            layer.self_attn.__class__ = SelfAttention
            layer.encoder_attn = (GatedCrossAttention if is_gated else CrossAttention)(config, layer_idx)
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
        """As BartDecoder's, whose attention to its own inputs has a mask; by CUDA graphs of few targets.

        Args:
            input_ids: See BartDecoder, for the others too.
            return_dict: False: a plain tuple of all fields, also of those that are None.
        """
        if is_traced() and return_dict is not False:
            # as BartModel calls it
            parts = input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask
            return super().forward(*parts, past_key_values, inputs_embeds, **kwargs)
        wanted = {name for name, value in kwargs.items() if value is not None and value is not False}
        decoded = None
        if attention_mask is None and past_key_values is None and "use_cache" not in wanted:
            if inputs_embeds is not None and encoder_hidden_states is not None and wanted <= {"n_memory"}:
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
        return tuple(getattr(output, item.name) for item in fields(output)) if return_dict is False else output

    def _recorded(self, inputs: list[Tensor | None], n_memory: int | None) -> Tensor | None:
        """The last layer's states `(B, T, D)` by CUDA graphs, for targets that leave a GPU waiting; None: not possible.

        Args:
            inputs: Embeddings `(B, T, D)`, what is attended to, and where, as `context_mask` gives it.
            n_memory: Leading positions of what is attended to that are state, where these have a gate.
        """
        config, (embeds, *others) = self.config, [part for part in inputs if part is not None]
        n_documents, n_targets, _ = embeds.shape
        # few lengths, each recorded once: positions behind the last one change nothing before them
        n_positions = -(-n_targets // TARGETS_STEP) * TARGETS_STEP
        gives_more = config.output_attentions or config.output_hidden_states
        is_checkpointed = any(layer.gradient_checkpointing for layer in self.layers)
        most = MOST_CHECKPOINTED_TARGETS if is_checkpointed else MOST_TARGETS
        is_short = n_documents * n_positions <= most and n_positions <= config.max_position_embeddings
        # others each time
        drops_layers = self.training and self.layerdrop > 0
        # the causal mask of eager attention copies a number from the CPU, which a capture refuses
        is_eager = "eager" in config._attn_implementation
        is_plain = config.schedule != "auto" or gives_more or drops_layers or is_eager or not is_short
        if is_plain or not can_capture(self, [embeds, *others]):
            return None
        padded = nn.functional.pad(embeds, (0, 0, 0, n_positions - n_targets))
        decoded = call_graphed(self, functools.partial(self._plain, n_memory), [padded, *others], n_memory)
        return decoded[:, :n_targets]

    def _plain(self, n_memory: int | None, embeds: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without checkpointing: of all recorded calls together, the last alone keeps anything."""
        settings = {"use_cache": False} | ({} if n_memory is None else {"n_memory": n_memory})
        # no attribute is added to other layers: a graph's key holds them
        checkpointed = [layer for layer in self.layers if layer.gradient_checkpointing]
        try:
            for layer in checkpointed:
                layer.gradient_checkpointing = False
            own_mask = self._causal_mask(embeds)
            return super().forward(None, own_mask, hidden, mask, None, embeds, **settings).last_hidden_state
        finally:
            for layer in checkpointed:
                layer.gradient_checkpointing = True

    def context_mask(self, encoder_outputs: RecurrentEncoderOutput) -> Tensor | None:
        """What the decoder sees, in the back-end's form: BartDecoder would wait for the device to see if it is all."""
        if encoder_outputs.has_padding is False:
            return None
        return self._bidirectional_mask(encoder_outputs.last_hidden_state, encoder_outputs.context_mask)

    def packed_masks(self, encoder_outputs: RecurrentEncoderOutput) -> list[Tensor]:
        """Likewise of each group of contexts that are packed."""
        groups = encoder_outputs.groups()
        return [self._bidirectional_mask(group.last_hidden_state, group.context_mask) for group, _ in groups]

    def _bidirectional_mask(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return create_bidirectional_mask(self.config, hidden[:, :1], mask, hidden, allow_is_bidirectional_skip=False)

    def _causal_mask(self, inputs: Tensor | None) -> Tensor | None:
        """Likewise of its own inputs, ids or embeddings: without a mask BartDecoder would make one and look at it."""
        if inputs is None or inputs.device.type == "cpu" or "flash" in self.config._attn_implementation:
            return None
        query = self.layernorm_embedding.weight.new_empty(1, inputs.shape[1], 1, device=inputs.device)
        return create_causal_mask(self.config, query, None, None, allow_is_causal_skip=False)
