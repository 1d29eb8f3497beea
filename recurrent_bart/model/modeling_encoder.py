"""Encoder: reads documents segment by segment.

Shape suffixes: B documents, n tokens of an uncut document, N segments, L tokens in a segment, P prefix length
(= slots: positions in front of a segment's tokens that write the state), D model width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.utils import logging

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.graph_guards import device_guard
from recurrent_bart.execution.grid import Grid, OutputSelection
from recurrent_bart.model.decoder_context import encoder_output
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput, with_final_norm
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.recurrence.bptt import n_segments_with_graph
from recurrent_bart.recurrence.encoder_layer import RecurrentBartEncoderLayer
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState, build_recurrence
from recurrent_bart.recurrence.segmentation import Segment, embed_segments_lazily, is_traced
from recurrent_bart.recurrence.segmented_batch import SegmentedBatch, read_selection

logger = logging.get_logger(__name__)


class RecurrentBartEncoder(RecurrentBartPreTrainedModel, BartEncoder):
    """BartEncoder or MBartEncoder that reads a document as segments, and carries a state between segments."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        for layer in self.layers:
            # change the class of the existing layer: a new one would draw random weights, and the same seed would give
            # another model
            layer.__class__ = RecurrentBartEncoderLayer
        # BART has no norm after the last layer
        self.layer_norm = nn.LayerNorm(config.d_model) if config.normalize_before else None
        self.recurrence = build_recurrence(config)
        self.checkpoints_segments = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: RecurrentState | None = None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        batch: SegmentedBatch | None = None,
        earlier: Sequence[Segment] = (),
        may_pack: bool = False,
        **kwargs: Any,
    ) -> RecurrentEncoderOutput | tuple:
        """Encode documents segment by segment.

        Args:
            input_ids: `(B, n)`, which this method cuts into segments, or `(B, N, L)`.
            attention_mask: 1 at tokens. A segment without tokens does not exist. None: all positions are tokens.
            inputs_embeds: `(B, n, D)` or `(B, N, L, D)` instead of ids.
            state: State after the segments that were read before these. With a state, a document may
                have nothing more to read.
            decode_at: `"last_segment"`: return the decoder's context after the last segment. `"every_segment"`: after
                each segment.
            target_segments: `(B, N)` booleans: return one context per True segment (one context if all are False)
                instead. With `decoder_context="section"` these segments end sections.
            output_attentions: Return attention weights of every layer; needs the eager back end.
            return_dict: False: return a plain tuple, see `RecurrentEncoderOutput.as_tuple`.
            batch: Documents that are already segmented; `inputs_embeds` are then the last segments' embeddings.
            earlier: With `batch`: segments before `inputs_embeds`, from `embed_segments`.
            may_pack: Allow packed contexts after `target_segments`, to save padding.

        Raises:
            ValueError: Inputs are missing or given twice, a document has no token, a segment is longer than
                `input_size`, uncut embeddings span several segments, `decode_at` is unknown, or `target_segments` or
                `state` has a wrong shape.
        """
        decode_at, target_segments = read_selection(kwargs, decode_at, target_segments)
        if self.is_traced_as_bart(input_ids, inputs_embeds, state, decode_at, target_segments):
            flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            output = super().forward(input_ids, attention_mask, inputs_embeds, **flags, **kwargs)
            output = with_final_norm(output, self.layer_norm)
            return output.to_tuple() if return_dict is False else output
        if batch is None:
            reading = input_ids, attention_mask, inputs_embeds, decode_at, target_segments
            batch = SegmentedBatch.build(self.config, self.training, *reading, may_be_empty=state is not None)
            inputs_embeds, earlier = self.embed_segments(batch)
        if state is not None:
            if not isinstance(state, RecurrentState):
                raise ValueError(f"state: a RecurrentState is needed, but a {type(state).__name__} was given")
            state.check(self.config, len(batch.attention_mask))
        recurrence = self.recurrence and self.recurrence(inputs_embeds.device)
        checkpoints_segments = self.checkpoints_segments and self.training
        grid = Grid(self.config, self.layers, recurrence, self._embed_segment, checkpoints_segments, self.layer_norm)
        selection = OutputSelection(
            every_segment=batch.decodes_several_segments,
            tokens=self.config.decoder_context in ("section", "all"),
            states=self.config.decoder_context == "memory",
            attentions=self._gives_attentions(output_attentions),
            hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        with device_guard(inputs_embeds.device):
            outputs = grid.run(inputs_embeds, batch.attention_mask, state, selection, earlier)
        output = encoder_output(self.config, outputs, batch, state, may_pack).unaligned(batch)
        if batch.has_barts_shapes:
            output = output.without_segments()
        return output.as_tuple() if return_dict is False else output

    def is_traced_as_bart(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        state: RecurrentState | None = None,
        decode_at: str = "last_segment",
        target_segments: Tensor | None = None,
    ) -> bool:
        """Return True if a model without recurrence is traced on one segment; then BART's own code runs.

        The code for longer documents needs mask values, which do not exist while a compiler or an exporter traces.
        """
        if not is_traced() or self.config.pre_seq_len or state is not None:
            return False
        if decode_at != "last_segment" or target_segments is not None:
            return False
        flat, n_dimensions = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
        return flat is not None and flat.dim() == n_dimensions and flat.shape[1] <= self.config.segment_size

    def embed_segments(self, batch: SegmentedBatch) -> tuple[Tensor, list[Segment]]:
        """Return embeddings `(B, N, L, D)` of the segments that get a gradient, and functions to embed earlier ones.

        Embeddings in `batch` are returned as they are. Under ZeRO-3 each call of the embedding is a collective, so the
        number of calls must not differ between ranks.
        """
        ids_BNL = batch.tokens
        if not batch.has_ids:
            return ids_BNL, []
        n_segments, n_reached = ids_BNL.shape[1], 0
        if torch.is_grad_enabled():
            n_reached = n_segments_with_graph(self.config, batch.is_read, batch.decodes_several_segments)
        earlier_BNL, reached_BNL = ids_BNL.split((n_segments - n_reached, n_reached), dim=1)
        earlier = embed_segments_lazily(self.embed_tokens, earlier_BNL, self.config.vocab_size)
        return self.embed_tokens(reached_BNL), earlier

    def _gives_attentions(self, output_attentions: bool | None) -> bool:
        is_requested = self.config.output_attentions if output_attentions is None else output_attentions
        if is_requested and "eager" not in self.config._attn_implementation:
            attention = self.config._attn_implementation
            logger.warning_once(f"output_attentions: {attention} returns no attention weights; use eager attention")
            return False
        return is_requested

    def _embed_segment(self, tokens_BLD: Tensor, slots_BPD: Tensor | None) -> Tensor:
        """Return the first layer's input `(B, P + L, D)`: slots without position, then tokens with positions from 0."""
        stream = tokens_BLD + self.embed_positions(tokens_BLD[:, :, 0])
        if slots_BPD is not None:
            stream = torch.cat([slots_BPD.to(stream.dtype), stream], dim=1)
        stream = self.layernorm_embedding(stream)
        return nn.functional.dropout(stream, p=self.dropout, training=self.training)
