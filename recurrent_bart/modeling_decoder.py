"""The decoder: it reads memory and tokens, behind masks for which it need not wait for the device."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.bart.modeling_bart import BartDecoder

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.prefix_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.recorded_call import call_recorded, can_record

# positions of all targets, padding among them. On an H200, BART-large's decoder and loss on 1,024 of them took 55 ms,
# forward and backward, launched one by one, all of it the processor's time; more than 1,024 was not measured
MOST_TARGETS = 4_096
# where it is checkpointed, for what a recorded decoder keeps is not computed again
MOST_CHECKPOINTED_TARGETS = 1_024
TARGETS_STEP = 32


class RecurrentBartDecoder(RecurrentBartPreTrainedModel, BartDecoder):
    """Identical to BartDecoder except: `CrossAttention`, with `prefix_attention="gated"` of memory through a gate."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        is_gated = config.has_state and config.prefix_attention == "gated"
        for layer_idx, layer in enumerate(self.layers):
            # the one that there is, for another would draw its weights first: the same seed would give another model
            layer.self_attn.__class__ = SelfAttention
            layer.encoder_attn = (GatedCrossAttention if is_gated else CrossAttention)(config, layer_idx)
        self.post_init()

    def recorded(self, input_ids: Tensor, hidden: Tensor, mask: Tensor | None, n_memory: int | None) -> Tensor | None:
        """The last layer's states `(B, T, D)` by CUDA graphs, for targets that leave a GPU waiting; None: not possible.

        Args:
            input_ids: `(B, T)`.
            hidden: What it attends to.
            mask: As `context_mask` gives it.
            n_memory: Leading positions of `hidden` that are state, where these have a gate.
        """
        config, n_targets = self.config, input_ids.shape[1]
        # few lengths, each recorded once: positions behind the last one change nothing before them
        n_positions = -(-n_targets // TARGETS_STEP) * TARGETS_STEP
        padded = nn.functional.pad(input_ids, (0, n_positions - n_targets), value=config.pad_token_id)
        inputs = [padded, hidden] + ([] if mask is None else [mask])
        gives_more = config.output_attentions or config.output_hidden_states
        is_checkpointed = any(layer.gradient_checkpointing for layer in self.layers)
        most = MOST_CHECKPOINTED_TARGETS if is_checkpointed else MOST_TARGETS
        is_short = padded.numel() <= most and n_positions <= config.max_position_embeddings
        if config.schedule != "auto" or gives_more or not is_short or not can_record(self, inputs):
            return None
        return call_recorded(self, functools.partial(self._plain, n_memory), inputs, n_memory)[:, :n_targets]

    def _plain(
        self,
        n_memory: int | None,
        call: Callable[..., Any],
        input_ids: Tensor,
        hidden: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Without checkpointing: of all recorded calls together, the last alone keeps anything."""
        memory = {} if n_memory is None else {"n_memory": n_memory}
        grains = [layer.gradient_checkpointing for layer in self.layers]
        try:
            for layer in self.layers:
                layer.gradient_checkpointing = False
            return call(
                input_ids=input_ids,
                attention_mask=self.own_mask(input_ids),
                encoder_hidden_states=hidden,
                encoder_attention_mask=mask,
                use_cache=False,
                **memory,
            ).last_hidden_state
        finally:
            for layer, grain in zip(self.layers, grains, strict=True):
                layer.gradient_checkpointing = grain

    def context_mask(self, encoder_outputs: RecurrentEncoderOutput) -> Tensor | None:
        """What the decoder sees, in the back-end's form: BartDecoder would wait for the device to see if it is all."""
        if encoder_outputs.has_padding is False:
            return None
        hidden = encoder_outputs.last_hidden_state
        return create_bidirectional_mask(
            self.config, hidden[:, :1], encoder_outputs.context_mask, hidden, allow_is_bidirectional_skip=False
        )

    def own_mask(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """What it sees of its own inputs, likewise: without a mask BartDecoder would make one and look at it."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        is_known = attention_mask is None and past_key_values is None and not use_cache
        if not is_known or inputs.device.type == "cpu" or "flash" in self.config._attn_implementation:
            return attention_mask
        query = self.embed_tokens.weight.new_empty(1, inputs.shape[1], 1, device=inputs.device)
        return create_causal_mask(self.config, query, None, None, allow_is_causal_skip=False)
