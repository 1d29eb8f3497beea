"""The decoder: it reads memory and tokens, behind masks for which it need not wait for the device."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.bart.modeling_bart import BartDecoder

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.prefix_attention import CrossAttention, GatedCrossAttention


class RecurrentBartDecoder(RecurrentBartPreTrainedModel, BartDecoder):
    """Identical to BartDecoder except: `CrossAttention`, with `prefix_attention="gated"` of memory through a gate."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        is_gated = config.has_state and config.prefix_attention == "gated"
        for layer_idx, layer in enumerate(self.layers):
            layer.encoder_attn = (GatedCrossAttention if is_gated else CrossAttention)(config, layer_idx)
        self.post_init()

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
