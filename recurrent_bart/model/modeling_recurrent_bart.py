"""Recurrent BART as a Hugging Face model.

Shape suffixes: B documents, N segments, T target length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bart.modeling_bart import (
    BartForConditionalGeneration,
    BartModel,
    BartScaledWordEmbedding,
    shift_tokens_right,
)
from transformers.utils.generic import can_return_tuple

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.decoder_context import target_or_last_segment
from recurrent_bart.model.generation import SegmentGeneration
from recurrent_bart.model.loss import (
    IGNORED,
    check_decoder_start,
    check_labels,
    check_unused,
    on_host,
    per_target,
    token_loss,
    wrap_last_label,
)
from recurrent_bart.model.modeling_decoder import RecurrentBartDecoder
from recurrent_bart.model.modeling_encoder import RecurrentBartEncoder
from recurrent_bart.model.modeling_outputs import (
    RecurrentBartLMOutput,
    RecurrentBartModelOutput,
    RecurrentEncoderOutput,
    given_on,
    put_back,
    take,
)
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.model.oracle_inputs import OracleInputs
from recurrent_bart.model.ragged_attention import ragged_contexts
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.model.token_head import TokenHead
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import to_device
from recurrent_bart.recurrence.segmented_batch import SegmentedBatch, read_selection


class RecurrentBartModel(RecurrentBartPreTrainedModel, BartModel):
    """BartModel whose encoder reads segments, and whose `forward` accepts and returns a `state`."""

    def __init__(self, config: RecurrentBartConfig):
        # skip BartModel.__init__: it would build and initialize a whole BART only to replace it
        super(BartModel, self).__init__(config)
        embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.shared = BartScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, embed_scale)
        self.encoder = RecurrentBartEncoder(config)
        self.decoder = RecurrentBartDecoder(config)
        self.post_init()

    def shift_right(self, ids_BT: Tensor) -> Tensor:
        """Return the decoder's inputs for labels, in the way of BART or of MBart; see `wraps_last_label`."""
        config = self.config
        if config.wraps_last_label:
            return wrap_last_label(ids_BT, config.pad_token_id)
        return shift_tokens_right(ids_BT, config.pad_token_id, config.decoder_start_token_id)

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
        is_decoded: bool = False,
        **kwargs: Any,
    ) -> RecurrentEncoderOutput:
        """Compute embeddings outside the encoder, run the encoder, and rebuild its output from a plain tuple.

        ZeRO-3 gathers the encoder's parameters by hooks on the encoder module. The hooks need a positional input that
        requires a gradient, which ids cannot, and they see only outputs in a tuple. Otherwise the encoder's gradient
        would be lost silently. With `is_decoded`, every context is decoded: a context without text is a ValueError.
        """
        decode_at, target_segments = read_selection(kwargs, decode_at, target_segments)
        reading = input_ids, attention_mask, inputs_embeds, decode_at, target_segments
        state = kwargs.get("state")
        batch = SegmentedBatch.build(self.config, self.training, *reading, may_be_empty=state is not None)
        embeds, earlier = self.encoder.embed_segments(batch)
        if torch.is_grad_enabled() and not embeds.requires_grad:
            embeds = embeds.detach().requires_grad_()
        outputs = self.encoder(None, None, embeds, batch=batch, earlier=earlier, return_dict=False, **kwargs)
        # the encoder has checked the state
        if is_decoded:
            batch.check_decoded(state)
        return RecurrentEncoderOutput.from_tuple(outputs)

    def decode(
        self,
        encoder_outputs: RecurrentEncoderOutput,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the decoder on embeddings, with a plain tuple as its output; `encode` explains why ZeRO-3 needs this."""
        self._check_positions(input_ids if inputs_embeds is None else inputs_embeds, past_key_values)
        hidden, packing, mask = encoder_outputs.last_hidden_state, encoder_outputs.packing, None
        # a cache holds padded keys and values
        has_cache = past_key_values is not None or kwargs.get("use_cache") is not False
        ragged = None if has_cache else ragged_contexts(self.config, encoder_outputs)
        # BartDecoder passes unknown arguments to its attention modules, which read `ragged`, `packed` and `n_memory`
        if ragged is not None:
            hidden, kwargs["ragged"] = ragged
        elif packing is None:
            mask = self.decoder.context_mask(encoder_outputs)
        else:
            kwargs["packed"] = packing, self.decoder.packed_masks(encoder_outputs)
        if self.config.has_state and self.config.prefix_attention == "gated":
            kwargs["n_memory"] = encoder_outputs.n_memory or 0
        if inputs_embeds is None:
            inputs_embeds, input_ids = self.decoder.embed_tokens(input_ids), None
        if packing is not None:
            inputs_embeds = inputs_embeds[to_device(packing.order, inputs_embeds.device)]
        inputs = input_ids, attention_mask, hidden, mask, past_key_values, inputs_embeds
        output = BaseModelOutputWithPastAndCrossAttentions(*self.decoder(*inputs, return_dict=False, **kwargs))
        if packing is not None:
            output.last_hidden_state = output.last_hidden_state[to_device(packing.order.argsort(), hidden.device)]
        return output

    def _check_positions(self, inputs: Tensor | None, past_key_values: Cache | None) -> None:
        n_read = 0 if past_key_values is None else past_key_values.get_seq_length()
        # a static cache returns a tensor, and reading it would synchronize with the device
        if inputs is not None and isinstance(n_read, int):
            self.check_positions(n_read + inputs.shape[1])

    def check_positions(self, n_positions: int) -> None:
        """Raise a ValueError if the decoder must read more positions than its position table has."""
        most = self.config.max_position_embeddings
        if n_positions > most:
            raise ValueError(
                f"decoder_input_ids or labels have {n_positions} positions, but max_position_embeddings is {most}. "
                "Without decoder_input_ids and labels, the decoder reads input_ids, shifted by one"
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | Sequence | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        state: RecurrentState | None = None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
        **kwargs: Any,
    ) -> RecurrentBartModelOutput:
        """Run encoder and decoder; see BartModel, and RecurrentBartEncoder for documents and `state`.

        A compiler or an exporter traces BartModel's code instead, see `RecurrentBartEncoder.is_traced_as_bart`.
        """
        whole = input_ids, inputs_embeds, state, decode_at, target_segments
        if encoder_outputs is None and self.encoder.is_traced_as_bart(*whole):
            if decoder_input_ids is None and decoder_inputs_embeds is None and input_ids is not None:
                decoder_input_ids = self.shift_right(input_ids)
            output = super().forward(
                input_ids,
                attention_mask,
                decoder_input_ids,
                decoder_attention_mask,
                None,
                past_key_values,
                inputs_embeds,
                decoder_inputs_embeds,
                use_cache,
                **kwargs,
            )
            return RecurrentBartModelOutput(**output)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None or input_ids.dim() != 2:
                raise ValueError(
                    "decoder_input_ids or labels are missing; the decoder can read input_ids instead only if their "
                    "shape is (batch, tokens)"
                )
            decoder_input_ids = self.shift_right(input_ids)
        if encoder_outputs is None:
            selected = read_selection(kwargs, decode_at, target_segments)
            reading = input_ids, attention_mask, inputs_embeds, *selected
            encoded = self.encode(*reading, is_decoded=True, state=state, **kwargs)
        else:
            encoded = RecurrentEncoderOutput.of(encoder_outputs, self.config, attention_mask)
            encoded.check_given(*read_selection(kwargs, decode_at, target_segments), self.config)
        encoded.check_one_context()
        decoder_outputs = self.decode(
            encoded,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return RecurrentBartModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            state=given_on(state, encoded.state),
        )


class RecurrentBartForConditionalGeneration(
    RecurrentBartPreTrainedModel, SegmentGeneration, OracleInputs, BartForConditionalGeneration
):
    """BartForConditionalGeneration for documents of several segments, with a `state` and with targets per segment."""

    def __init__(self, config: RecurrentBartConfig):
        super(BartForConditionalGeneration, self).__init__(config)
        self.model = RecurrentBartModel(config)
        self.final_logits_bias = nn.Buffer(torch.zeros(1, config.vocab_size))
        self.lm_head = TokenHead(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the decoder's inputs for labels; see `RecurrentBartModel.shift_right`."""
        return self.model.shift_right(labels)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the head; turn a plain layer, which resizing creates, into a TokenHead."""
        super().set_output_embeddings(
            TokenHead.of(new_embeddings) if type(new_embeddings) is nn.Linear else new_embeddings
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | Sequence | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        state: RecurrentState | None = None,
        num_items_in_batch: Tensor | int | None = None,
        oracle: Oracle | None = None,
        return_logits: bool = True,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> RecurrentBartLMOutput:
        """Compute loss and logits; see BartForConditionalGeneration and RecurrentBartEncoder.

        Args:
            labels: `(B, T)`, one target per document, or `(B, N, T)`, one per segment; -100 where there is none.
            num_items_in_batch: Number of targets in the optimizer step, which divides the summed loss; None: the number
                of targets in `labels`.
            oracle: Source of some decoder input tokens; None: all come from `labels`.
            return_logits: False: with labels, return the loss only; the full logits are then never in memory.
            smoothing: Share of each target that the loss spreads over the vocabulary, from 0 to below 1.

        Raises:
            ValueError: Labels or decoder inputs are invalid, and the message names the row; a target is at a segment
                without text; or decoder inputs are given together with labels `(B, N, T)`.
        """
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: must be at least 0 and below 1")
        if labels is not None and labels.dim() == 3:
            unused = {
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "decoder_inputs_embeds": decoder_inputs_embeds,
                "encoder_outputs": encoder_outputs,
                "past_key_values": past_key_values,
                **{name: kwargs.get(name) for name in ("decode_at", "target_segments", "every_segment")},
            }
            check_unused(unused, "labels (B, N, T)")
            reading = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
            known = on_host(labels)
            # on the CPU labels are unknown during tracing; treat every segment as a target segment
            has_target = torch.ones(labels.shape[:2], dtype=torch.bool)
            if known is not None:
                has_target = (known != IGNORED).any(dim=-1)
                check_labels(known[has_target], self.config.vocab_size, every_row=False)
            # an oracle selects contexts by row, which packed contexts do not have
            targets = {"target_segments": has_target, "may_pack": oracle is None, "is_decoded": known is not None}
            encoded = self.model.encode(**reading, state=state, **targets, **kwargs)
            scoring = num_items_in_batch, return_logits, smoothing
            output = self._decode_segments(encoded, labels, has_target, oracle, *scoring)
            output.state = given_on(state, encoded.state)
            return output
        if labels is not None:
            use_cache = False
            known = on_host(labels)
            if known is not None:
                check_labels(known, self.config.vocab_size, every_row=True)
            labels = to_device(labels, self.final_logits_bias.device)
            if decoder_input_ids is not None:
                name = "the last label" if self.config.wraps_last_label else "decoder_start_token_id"
                check_decoder_start(decoder_input_ids, self.prepare_decoder_input_ids_from_labels(labels), name)
            elif decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if oracle is not None:
            if labels is None or decoder_attention_mask is not None or decoder_inputs_embeds is not None:
                raise ValueError("oracle: needs labels, and neither decoder_attention_mask nor decoder_inputs_embeds")
            if encoder_outputs is None:
                reading = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
                encoder_outputs = self.model.encode(**reading, is_decoded=True, state=state, **kwargs)
            encoder_outputs = RecurrentEncoderOutput.of(encoder_outputs, self.config, attention_mask)
            encoder_outputs.check_one_context()
            decoder_input_ids = self._mixed_inputs(oracle, encoder_outputs, decoder_input_ids, labels)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            state=state,
            **kwargs,
        )
        loss, logits = self._score(outputs.last_hidden_state, labels, num_items_in_batch, return_logits, smoothing)
        return RecurrentBartLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            state=outputs.state,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits + self.final_logits_bias.to(logits.device)

    def _score(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        return_logits: bool,
        smoothing: float,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the loss, None without labels, and the logits, None if neither requested nor needed."""
        # a replaced head, for example a quantized one, returns logits only
        if labels is not None and not return_logits and isinstance(self.lm_head, TokenHead):
            total = self.lm_head(hidden, labels, self.final_logits_bias, smoothing)
            return per_target(total, labels, num_items_in_batch), None
        logits = self._logits(hidden)
        return None if labels is None else token_loss(logits, labels, num_items_in_batch, smoothing), logits

    def _decode_segments(
        self,
        encoded: RecurrentEncoderOutput,
        labels_BNT: Tensor,
        has_target: Tensor,
        oracle: Oracle | None,
        *scoring: Any,
    ) -> RecurrentBartLMOutput:
        # without any target, still decode one segment, so that every parameter takes part on every rank
        has_target = target_or_last_segment(has_target)
        labels = take(to_device(labels_BNT, self.final_logits_bias.device), has_target)
        decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if oracle is not None:
            decoder_input_ids = self._mixed_inputs(oracle, encoded, decoder_input_ids, labels)
        decoded = self.model.decode(encoded, input_ids=decoder_input_ids, use_cache=False)
        loss, logits = self._score(decoded.last_hidden_state, labels, *scoring)
        return RecurrentBartLMOutput(
            loss=loss,
            logits=None if logits is None else put_back(logits, has_target),
        )


AutoConfig.register(RecurrentBartConfig.model_type, RecurrentBartConfig)
AutoModel.register(RecurrentBartConfig, RecurrentBartModel)
AutoModelForSeq2SeqLM.register(RecurrentBartConfig, RecurrentBartForConditionalGeneration)
