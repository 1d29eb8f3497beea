"""Encoder layer whose `forward` computes one cell of the grid."""

# Shape suffixes: B documents, P prefix length (= slots), L tokens in a segment, H heads, D model width.

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.bart.modeling_bart import BartEncoderLayer
from transformers.models.mbart.modeling_mbart import MBartEncoderLayer

from recurrent_bart.recurrence.associative_memory import Matrix
from recurrent_bart.recurrence.cell import (
    AttentionMasks,
    SingleLayer,
    attention_input,
    encoder_cell,
    normalizes_before,
)
from recurrent_bart.recurrence.prefix_recurrence import KeyValue


class RecurrentBartEncoderLayer(BartEncoderLayer):
    """BartEncoderLayer that can also compute a cell: one layer on one segment with a state.

    With `normalize_before` the layer is an MBartEncoderLayer in all but its type. The sequential schedule calls each
    layer as a module, so the layer's hooks run. FSDP and accelerate load parameters in hooks, and gradient
    checkpointing recomputes the call.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMasks | None,
        read_prefix: Callable[[Tensor], KeyValue] | None = None,
        gate_BH: Tensor | None = None,
        read_matrix: Callable[[Tensor], Matrix] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute a cell if given `AttentionMasks`; otherwise return the outputs of BartEncoderLayer or MBart's.

        Args:
            hidden_states: Slots and tokens that enter the layer.
            attention_mask: Masks of the cell.
            read_prefix: Function from the slots that attention reads to the layer's prefix: keys and values of the
                state. None disables the recurrence. The prefix may need the layer's own parameters, so this call
                computes it.
            gate_BH: See `encoder_cell`.
            read_matrix: Function from the hidden states that attention reads to the layer's associative memory.

        Returns:
            A cell's outputs, see `encoder_cell`, and the slots that attention reads.
        """
        if not isinstance(attention_mask, AttentionMasks):
            plain = MBartEncoderLayer if normalizes_before(self) else BartEncoderLayer
            return plain.forward(self, hidden_states, attention_mask, **kwargs)
        layer = SingleLayer(self)
        attended = attention_input(layer, hidden_states)
        slots = attended[:, : attention_mask.n_slots]
        prefix = None if read_prefix is None else read_prefix(slots)
        matrix = None if read_matrix is None else read_matrix(attended)
        return *encoder_cell(layer, hidden_states, attended, attention_mask, prefix, gate_BH, matrix), slots
