"""Recurrent BART as a Hugging Face model.

Shape suffixes: B documents, N segments, L tokens in a segment, P prefix length (= slots), A attended length,
T target length, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.models.bart.modeling_bart import (
    BartDecoder,
    BartEncoder,
    BartForConditionalGeneration,
    BartModel,
    BartPreTrainedModel,
    BartScaledWordEmbedding,
    shift_tokens_right,
)
from transformers.utils.generic import can_return_tuple

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.prefix_attention import GatedCrossAttention
from recurrent_bart.prefix_recurrence import PrefixRecurrence, RecurrentState
from recurrent_bart.schedules import GridOutput, sequential
from recurrent_bart.segmentation import (
    empty_segments_at_end,
    gather_segments,
    segment_positions,
    shift_segments,
)
from recurrent_bart.targets import IGNORED, check_decoder_start, check_labels, token_loss


@dataclass
class RecurrentEncoderOutput(BaseModelOutput):
    """What the decoder may attend to, and the state to go on from.

    Attributes:
        last_hidden_state: `(B, A, D)`: the final state, then the tokens of the last segment. With
            `every_segment=True` `(B, N, A, D)`: the same after each segment.
        context_mask: `(B, A)` or `(B, N, A)`, 1 where there is something to attend to.
        n_memory: Leading positions of `last_hidden_state` that are state.
        state: The state after the last segment; None where `pre_seq_len` is 0.
    """

    context_mask: Tensor | None = None
    n_memory: int | None = None
    state: RecurrentState | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that gradient may flow through, flat: hooks on modules see nothing else."""
        memory, position = (self.state.memory, self.state.position) if self.state else (None, None)
        return self.last_hidden_state, self.context_mask, memory, position

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor | None, ...], n_memory: int) -> "RecurrentEncoderOutput":
        """What `tensors` gave."""
        last_hidden_state, context_mask, memory, position = tensors
        state = None if memory is None else RecurrentState(memory, position)
        return cls(last_hidden_state, context_mask=context_mask, n_memory=n_memory, state=state)

    def rows(self, is_chosen_BN: Tensor) -> "RecurrentEncoderOutput":
        """The contexts after chosen segments `(B, N)` as the rows of one batch `(M, A, D)`."""
        return RecurrentEncoderOutput(
            last_hidden_state=self.last_hidden_state[is_chosen_BN],
            context_mask=self.context_mask[is_chosen_BN],
            n_memory=self.n_memory,
        )


@dataclass
class RecurrentBartModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` and the `state` after the last segment."""

    state: RecurrentState | None = None


@dataclass
class RecurrentBartLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and the `state` after the last segment.

    With `labels` `(B, N, T)`, `logits` are `(B, N, T, V)`, zero for segments that have no target.
    """

    state: RecurrentState | None = None


class RecurrentBartPreTrainedModel(BartPreTrainedModel):
    """Weight initialisation and loading for all classes here."""

    config_class = RecurrentBartConfig
    config: RecurrentBartConfig
    # the prefix is read by matrix products around it, not by whole layers that a compiler could swallow
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrefixRecurrence):
            module.init_weights(self.config.init_std)
        if isinstance(module, GatedCrossAttention):
            init.zeros_(module.memory_gate)
        if isinstance(module, RecurrentBartForConditionalGeneration):
            init.zeros_(module.final_logits_bias)


class RecurrentBartEncoder(RecurrentBartPreTrainedModel, BartEncoder):
    """Identical to BartEncoder except: it reads segments, and a state goes from one to the next."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        self.recurrence = PrefixRecurrence(config) if config.pre_seq_len else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: RecurrentState | None = None,
        every_segment: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentEncoderOutput | tuple:
        """Read documents.

        Args:
            input_ids: `(B, n)`, segmented here, or `(B, N, L)`.
            attention_mask: Like `input_ids`, 1 at tokens. A segment without any is one that its document does not
                have. None: all are tokens.
            inputs_embeds: `(B, n, D)` or `(B, N, L, D)` instead of ids.
            state: What was read before.
            every_segment: Give the decoder's context after each segment.
            return_dict: False: the output's tensors as a plain tuple, see `RecurrentEncoderOutput.tensors`.

        Raises:
            ValueError: Ids and embeddings are both given or both missing, a document has no token, or a segment is
                longer than `config.input_size`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        segments, mask_BNL = segment_documents(self.config, self.training, input_ids, attention_mask, inputs_embeds)
        n_empty_B = empty_segments_at_end(mask_BNL.bool().any(dim=-1))
        segments, mask_BNL = shift_segments(segments, n_empty_B), shift_segments(mask_BNL, n_empty_B)
        if inputs_embeds is None:
            segments = self.embed_tokens(segments)
        grid = sequential(
            self.config,
            self.layers,
            self.recurrence,
            embed=lambda t: self._embed_segment(segments[:, t]),
            mask_BNL=mask_BNL,
            state=state,
            keep_every_segment=every_segment,
        )
        output = self._decoder_context(grid, mask_BNL, n_empty_B, every_segment)
        return output.tensors() if return_dict is False else output

    def _embed_segment(self, tokens_BLD: Tensor) -> Tensor:
        """First layer's stream `(B, P + L, D)`: slots, which have no position, and tokens, counted from 0."""
        stream = tokens_BLD + self.embed_positions(tokens_BLD[:, :, 0])
        if self.recurrence is not None:
            slots = self.recurrence.slot_embedding.expand(stream.shape[0], -1, -1)
            stream = torch.cat([slots, stream], dim=1)
        stream = self.layernorm_embedding(stream)
        return nn.functional.dropout(stream, p=self.dropout, training=self.training)

    def _decoder_context(
        self, grid: GridOutput, mask_BNL: Tensor, n_empty_B: Tensor, every_segment: bool
    ) -> RecurrentEncoderOutput:
        context_BNAD = torch.stack(grid.tokens, dim=1)
        mask_BNA = mask_BNL if every_segment else mask_BNL[:, -1:]
        if grid.memories:
            memory_BNPD = torch.stack(grid.memories, dim=1)
            context_BNAD = torch.cat([memory_BNPD, context_BNAD], dim=2)
            mask_BNA = torch.cat([mask_BNA.new_ones(memory_BNPD.shape[:3]), mask_BNA], dim=2)
        if every_segment:
            context, mask = shift_segments(context_BNAD, -n_empty_B), shift_segments(mask_BNA, -n_empty_B)
        else:
            context, mask = context_BNAD.squeeze(1), mask_BNA.squeeze(1)
        return RecurrentEncoderOutput(
            last_hidden_state=context, context_mask=mask, n_memory=self.config.pre_seq_len, state=grid.state
        )


def segment_documents(
    config: RecurrentBartConfig,
    is_training: bool,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Ids or embeddings as `(B, N, L, ...)` with their mask.

    In training, documents are cut after `config.max_n_segments`.
    """
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    is_flat = tokens.dim() == (2 if inputs_embeds is None else 3)
    shape = tokens.shape[: 2 if is_flat else 3]
    mask = attention_mask if attention_mask is not None else tokens.new_ones(shape, dtype=torch.long)
    if is_flat and shape[1] <= config.segment_size:
        # one segment: exactly as it came, as BART would see it
        return tokens.unsqueeze(1), mask.unsqueeze(1)
    if is_flat:
        special = config.bos_token_id, config.eos_token_id
        positions = segment_positions(mask, input_ids, special, config.segment_size, config.input_size)
        fill = config.pad_token_id if inputs_embeds is None else 0.0
        tokens, mask = gather_segments(tokens, positions, fill), (positions >= 0).to(mask.dtype)
    if tokens.shape[2] > config.input_size:
        raise ValueError(f"segments of {tokens.shape[2]} tokens: input_size is {config.input_size}")
    if is_training and config.max_n_segments != -1:
        tokens, mask = tokens[:, : config.max_n_segments], mask[:, : config.max_n_segments]
    return tokens, mask


class RecurrentBartDecoder(RecurrentBartPreTrainedModel, BartDecoder):
    """Identical to BartDecoder except: with `prefix_attention="gated"`, memory is read through a gate."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        if config.pre_seq_len and config.prefix_attention == "gated":
            for layer_idx, layer in enumerate(self.layers):
                layer.encoder_attn = GatedCrossAttention(config, layer_idx)
        self.post_init()


class RecurrentBartModel(RecurrentBartPreTrainedModel, BartModel):
    """Identical to BartModel except: its encoder reads segments, and `state` goes in and out."""

    def __init__(self, config: RecurrentBartConfig):
        # not BartModel's: that would build and initialise a whole BART to throw it away
        super(BartModel, self).__init__(config)
        embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.shared = BartScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, embed_scale)
        self.encoder = RecurrentBartEncoder(config)
        self.decoder = RecurrentBartDecoder(config)
        self.post_init()

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> RecurrentEncoderOutput:
        """Run the encoder, from embeddings made outside it to a plain tuple.

        ZeRO-3 gathers the encoder as one module, by hooks on it. They see positional inputs alone, of which one must
        require a gradient, as ids never do; and of outputs those in a tuple. Without them the encoder's gradient
        would be lost in silence.
        """
        if inputs_embeds is None and input_ids is not None:
            input_ids, attention_mask = segment_documents(self.config, self.training, input_ids, attention_mask, None)
            inputs_embeds = self.shared(input_ids)
        if torch.is_grad_enabled() and inputs_embeds is not None and not inputs_embeds.requires_grad:
            inputs_embeds = inputs_embeds.detach().requires_grad_()
        tensors = self.encoder(None, attention_mask, inputs_embeds, return_dict=False, **kwargs)
        return RecurrentEncoderOutput.from_tensors(tensors, self.config.pre_seq_len)

    def decode(
        self, encoder_outputs: RecurrentEncoderOutput, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the decoder on what the encoder gave."""
        # BartDecoder hands further arguments down to its attention, which alone knows this one
        memory = {"n_memory": encoder_outputs.n_memory or 0} if self.config.prefix_attention == "gated" else {}
        return self.decoder(
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=encoder_outputs.context_mask,
            **memory,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: RecurrentEncoderOutput | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        state: RecurrentState | None = None,
        **kwargs: Any,
    ) -> RecurrentBartModelOutput:
        """As BartModel's; see RecurrentBartEncoder for what documents and `state` are."""
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None or input_ids.dim() != 2:
                raise ValueError("decoder_input_ids are needed: only flat input_ids can be shifted to stand for them")
            decoder_input_ids = shift_tokens_right(
                input_ids, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, state=state, **kwargs)
        decoder_outputs = self.decode(
            encoder_outputs,
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
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            state=encoder_outputs.state,
        )


class RecurrentBartForConditionalGeneration(
    RecurrentBartPreTrainedModel, BartForConditionalGeneration, GenerationMixin
):
    """Identical to BartForConditionalGeneration except: documents of any length, `state`, targets per segment."""

    def __init__(self, config: RecurrentBartConfig):
        super(BartForConditionalGeneration, self).__init__(config)
        self.model = RecurrentBartModel(config)
        self.final_logits_bias = nn.Buffer(torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: RecurrentEncoderOutput | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        state: RecurrentState | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> RecurrentBartLMOutput:
        """As BartForConditionalGeneration's; see RecurrentBartEncoder for what documents and `state` are.

        Args:
            labels: `(B, T)`, one target per document, or `(B, N, T)`, one per segment; -100 where there is none.
            num_items_in_batch: Number of target tokens in the whole optimizer step, by which the summed loss is
                divided; None: those of `labels`.

        Raises:
            ValueError: Labels or decoder inputs are not usable; the message names the row.
        """
        if labels is not None and labels.dim() == 3:
            return self._forward_segments(
                labels, num_items_in_batch, input_ids, attention_mask, inputs_embeds, state=state, **kwargs
            )
        if labels is not None:
            use_cache = False
            check_labels(labels, self.config.vocab_size, every_row=True)
            if decoder_input_ids is not None:
                check_decoder_start(decoder_input_ids, self.config.decoder_start_token_id)
            elif decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
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
        logits = self._logits(outputs.last_hidden_state)
        return RecurrentBartLMOutput(
            loss=None if labels is None else token_loss(logits, labels, num_items_in_batch),
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
        return self.lm_head(hidden) + self.final_logits_bias

    def _forward_segments(
        self, labels_BNT: Tensor, num_items_in_batch: Tensor | int | None, *inputs: Any, **kwargs: Any
    ) -> RecurrentBartLMOutput:
        """Targets per segment: all segments that have one are decoded as one batch."""
        encoded = self.model.encode(*inputs, every_segment=True, **kwargs)
        if labels_BNT.shape[:2] != encoded.last_hidden_state.shape[:2]:
            raise ValueError(
                f"labels for {tuple(labels_BNT.shape[:2])} documents and segments: there are "
                f"{tuple(encoded.last_hidden_state.shape[:2])}"
            )
        has_target = (labels_BNT != IGNORED).any(dim=-1)
        # without any target one segment is decoded all the same, so that every parameter takes part on every rank
        has_target[0, -1] |= ~has_target.any()
        labels = labels_BNT[has_target]
        check_labels(labels, self.config.vocab_size, every_row=False)
        decoded = self.model.decode(
            encoded.rows(has_target), input_ids=self.prepare_decoder_input_ids_from_labels(labels), use_cache=False
        )
        logits = self._logits(decoded.last_hidden_state)
        logits_BNTV = logits.new_zeros(*labels_BNT.shape, logits.shape[-1])
        logits_BNTV[has_target] = logits
        return RecurrentBartLMOutput(
            loss=token_loss(logits, labels, num_items_in_batch),
            logits=logits_BNTV,
            encoder_last_hidden_state=encoded.last_hidden_state,
            state=encoded.state,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        every_segment: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As GenerationMixin's, also of documents `(B, N, L)`, from a `state`, and after each segment.

        Returns:
            Ids `(B, T)`, or with `every_segment=True` `(B, N, T)`, pad where a document has no such segment.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        encoded = kwargs.pop("encoder_outputs", None)
        if encoded is None:
            encoded = self._read_to_generate(input_ids, every_segment, kwargs)
        if every_segment:
            return self._generate_segments(encoded, generation_config, **kwargs)
        is_flat = input_ids is not None and input_ids.dim() == 2
        # the encoder is done with them, but GenerationMixin may look at flat ids
        return super().generate(input_ids if is_flat else None, generation_config, encoder_outputs=encoded, **kwargs)

    def _read_to_generate(
        self, input_ids: Tensor | None, every_segment: bool, kwargs: dict[str, Any]
    ) -> RecurrentEncoderOutput:
        """Run the encoder as `forward` does, which `GenerationMixin` would call on its own; takes its arguments."""
        reading = {name: kwargs.pop(name, None) for name in ("attention_mask", "inputs_embeds", "state")}
        pad_token_id = self.config.pad_token_id
        if reading["attention_mask"] is None and input_ids is not None and (input_ids == pad_token_id).any():
            reading["attention_mask"] = input_ids.ne(pad_token_id).long()
        return self.model.encode(input_ids, every_segment=every_segment, **reading)

    def _generate_segments(
        self, encoded: RecurrentEncoderOutput, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> Tensor:
        is_read_BN = encoded.context_mask[:, :, encoded.n_memory :].bool().any(dim=-1)
        texts_MT = super().generate(None, generation_config, encoder_outputs=encoded.rows(is_read_BN), **kwargs)
        texts_BNT = texts_MT.new_full((*is_read_BN.shape, texts_MT.shape[-1]), self.config.pad_token_id)
        texts_BNT[is_read_BN] = texts_MT
        return texts_BNT


AutoConfig.register(RecurrentBartConfig.model_type, RecurrentBartConfig)
AutoModel.register(RecurrentBartConfig, RecurrentBartModel)
AutoModelForSeq2SeqLM.register(RecurrentBartConfig, RecurrentBartForConditionalGeneration)
