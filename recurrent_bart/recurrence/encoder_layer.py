"""An encoder layer whose `forward` is one cell of the grid.

Shape suffixes: B documents, P prefix length (= slots), L tokens in a segment, H heads, D model width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.recurrence.associative_memory import Matrix
from recurrent_bart.recurrence.cell import AttentionMasks, SingleLayer, encoder_cell
from recurrent_bart.recurrence.prefix_recurrence import KeyValue


class RecurrentBartEncoderLayer(BartEncoderLayer):
    """Identical to BartEncoderLayer except: it also computes a cell.

    The sequential schedule calls each layer as a module. So the hooks of the layer run: FSDP and accelerate bring the
    parameters by such hooks, and gradient checkpointing recomputes the call.
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
        """Return a cell's outputs, see `encoder_cell`, or BART's where the mask is BART's.

        Args:
            hidden_states: `(B, P + L, D)`, slots in front of tokens.
            attention_mask: What slots and tokens see, or a mask of BART's.
            read_prefix: Gives the layer's prefix from the slots that enter it; None switches the recurrence off. The
                prefix may need the layer's own parameters, so it is read here.
            gate_BH: See `encoder_cell`.
            matrix: See `encoder_cell`.
            kwargs: Arguments of BartEncoderLayer.
        """
        if not isinstance(attention_mask, AttentionMasks):
            return super().forward(hidden_states, attention_mask, **kwargs)
        prefix = None if read_prefix is None else read_prefix(hidden_states[:, : attention_mask.n_slots])
        return encoder_cell(SingleLayer(self), hidden_states, attention_mask, prefix, gate_BH, matrix)
