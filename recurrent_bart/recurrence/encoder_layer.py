"""Encoder layer whose `forward` computes one cell of the grid."""

# Shape suffixes: B documents, P prefix length (= slots), L tokens in a segment, H heads, D model width.

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.recurrence.associative_memory import Matrix
from recurrent_bart.recurrence.cell import AttentionMasks, SingleLayer, encoder_cell
from recurrent_bart.recurrence.prefix_recurrence import KeyValue


class RecurrentBartEncoderLayer(BartEncoderLayer):
    """BartEncoderLayer that can also compute a cell: one layer on one segment with a state.

    The sequential schedule calls each layer as a module, so the layer's hooks run. FSDP and accelerate load parameters
    in hooks, and gradient checkpointing recomputes the call.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMasks | None,
        read_prefix: Callable[[Tensor], KeyValue] | None = None,
        gate_BH: Tensor | None = None,
        matrix: Matrix | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a cell's outputs (see `encoder_cell`) if given `AttentionMasks`; otherwise BartEncoderLayer's outputs.

        `read_prefix` returns the layer's prefix (keys and values of the state) for the slots that enter the layer; None
        disables the recurrence. The prefix may need the layer's own parameters, so this call computes it.
        """
        if not isinstance(attention_mask, AttentionMasks):
            return super().forward(hidden_states, attention_mask, **kwargs)
        prefix = None if read_prefix is None else read_prefix(hidden_states[:, : attention_mask.n_slots])
        return encoder_cell(SingleLayer(self), hidden_states, attention_mask, prefix, gate_BH, matrix)
