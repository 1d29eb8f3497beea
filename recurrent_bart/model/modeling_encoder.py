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
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.modeling_pretrained import RecurrentBartPreTrainedModel
from recurrent_bart.recurrence.encoder_layer import RecurrentBartEncoderLayer
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState, build_recurrence
from recurrent_bart.recurrence.segmentation import (
    Segment,
    align_at_end,
    align_marks,
    embed_segments_lazily,
    has_barts_shapes,
    is_traced,
    segment_documents,
)

logger = logging.get_logger(__name__)


class RecurrentBartEncoder(RecurrentBartPreTrainedModel, BartEncoder):
    """Identical to BartEncoder except: it reads a document as segments, and carries a state between segments."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        for layer in self.layers:
            # change the class of the existing layer: a new one would draw random weights, and the same seed would give
            # another model
            layer.__class__ = RecurrentBartEncoderLayer
        self.recurrence = build_recurrence(config)
        self.checkpoints_segments = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: RecurrentState | None = None,
        every_segment: bool | Tensor = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        earlier: Sequence[Segment] = (),
        may_pack: bool = False,
        **kwargs: Any,
    ) -> RecurrentEncoderOutput | tuple:
        """Encode documents segment by segment.

        Args:
            input_ids: `(B, n)`, which this method cuts into segments, or `(B, N, L)`.
            attention_mask: 1 at tokens. A segment without tokens does not exist. None: all positions are tokens.
            inputs_embeds: `(B, n, D)` or `(B, N, L, D)` instead of ids.
            state: State of the text read before. With a state, a document may have nothing more to read.
            every_segment: True: return the decoder's context after each segment. `(B, N)` booleans: return one row per
                True segment (one row if all are False); with `decoder_context="section"` these segments end sections.
            output_attentions: Return attention weights of every layer; needs the eager back end.
            return_dict: False: return a plain tuple, see `RecurrentEncoderOutput.as_tuple`.
            earlier: Segments before `inputs_embeds`, from `embed_segments`; `attention_mask` then covers all segments.
            may_pack: Allow packed contexts of the segments in `every_segment`, to save padding.

        Raises:
            ValueError: Inputs are missing or given twice, a document has no token, a segment is longer than
                `input_size`, uncut embeddings span several segments, or `every_segment` or `state` has a wrong shape.
        """
        if self.is_traced_as_bart(input_ids, inputs_embeds, state, every_segment):
            flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            return super().forward(input_ids, attention_mask, inputs_embeds, return_dict=return_dict, **flags, **kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        is_flat = inputs_embeds.dim() == 3 if input_ids is None else input_ids.dim() == 2
        segments, mask = segment_documents(self.config, self.training, input_ids, attention_mask, inputs_embeds)
        if state is not None:
            state.check(self.config, len(mask))
        segments, mask, n_empty_B = align_at_end(segments, mask, may_be_empty=state is not None)
        marked_BN = aligned_BN = None
        if isinstance(every_segment, Tensor):
            marked_BN, every_segment = every_segment.cpu(), True
            aligned_BN = align_marks(marked_BN, mask, n_empty_B)
        if inputs_embeds is None:
            segments, earlier = self.embed_segments(segments, every_segment)
        recurrence = self.recurrence and self.recurrence(segments.device)
        grid = Grid(
            self.config, self.layers, recurrence, self._embed_segment, self.checkpoints_segments and self.training
        )
        selection = OutputSelection(
            every_segment=every_segment,
            tokens=self.config.decoder_context in ("section", "all"),
            memories=self.config.decoder_context == "memory",
            attentions=self._gives_attentions(output_attentions),
            hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        with device_guard(segments.device):
            outputs = grid.run(segments, mask, state, selection, earlier)
        output = encoder_output(self.config, outputs, mask, state, every_segment, aligned_BN, may_pack)
        output = output.shifted(-n_empty_B, marked_BN)
        if is_flat and has_barts_shapes(self.config, mask):
            output = output.without_segments()
        return output.as_tuple() if return_dict is False else output

    def is_traced_as_bart(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        state: RecurrentState | None = None,
        every_segment: bool | Tensor = False,
        **_: Any,
    ) -> bool:
        """Return True if a model without recurrence is traced on one segment; then BART's own code runs.

        The code for longer documents needs mask values, which do not exist while a compiler or an exporter traces.
        """
        if not is_traced() or self.config.pre_seq_len or state is not None or every_segment is not False:
            return False
        flat, n_dimensions = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
        return flat is not None and flat.dim() == n_dimensions and flat.shape[1] <= self.config.segment_size

    def embed_segments(self, ids_BNL: Tensor, every_segment: bool) -> tuple[Tensor, list[Segment]]:
        """Return embeddings `(B, N, L, D)` of the segments that get a gradient, and functions to embed earlier ones.

        Under ZeRO-3 each call of the embedding is a collective, so the number of calls must not differ between ranks.
        """
        n_segments, window = ids_BNL.shape[1], self.config.bptt_window
        n_reached = n_segments if every_segment or window is None else min(window, n_segments)
        if not torch.is_grad_enabled():
            n_reached = 0
        earlier_BNL, reached_BNL = ids_BNL.split((n_segments - n_reached, n_reached), dim=1)
        earlier = embed_segments_lazily(self.embed_tokens, earlier_BNL, self.config.vocab_size)
        return self.embed_tokens(reached_BNL), earlier

    def _gives_attentions(self, output_attentions: bool | None) -> bool:
        is_requested = self.config.output_attentions if output_attentions is None else output_attentions
        if is_requested and "eager" not in self.config._attn_implementation:
            logger.warning_once(f"output_attentions: {self.config._attn_implementation} has none to give, eager has")
            return False
        return is_requested

    def _embed_segment(self, tokens_BLD: Tensor, slots_BPD: Tensor | None) -> Tensor:
        """Return the first layer's input `(B, P + L, D)`: slots without position, then tokens with positions from 0."""
        stream = tokens_BLD + self.embed_positions(tokens_BLD[:, :, 0])
        if slots_BPD is not None:
            stream = torch.cat([slots_BPD.to(stream.dtype), stream], dim=1)
        stream = self.layernorm_embedding(stream)
        return nn.functional.dropout(stream, p=self.dropout, training=self.training)
