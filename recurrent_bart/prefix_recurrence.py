"""The core: a state per layer, its projection to key/value prefixes, its update from the slots.

Shape suffixes: B documents, P prefix length (= slots), E encoder layers, H heads, K head width, D model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig


@dataclass
class RecurrentState:
    """What has been read so far; goes into `forward` and `generate` and comes out again.

    Attributes:
        memory: `(B, E, P, D)`, the state of every layer.
        position: `(B,)`, number of segments read.
    """

    memory: Tensor
    position: Tensor

    def detach(self) -> "RecurrentState":
        """The same numbers without their history."""
        return RecurrentState(self.memory.detach(), self.position)

    def to(self, *args: Any, **kwargs: Any) -> "RecurrentState":
        """Move it as `Tensor.to` does; a dtype applies to `memory` alone."""
        memory = self.memory.to(*args, **kwargs)
        return RecurrentState(memory, self.position.to(memory.device))


class PrefixRecurrence(nn.Module):
    """State and slots in, new state and next keys and values out, all layers in one batched matrix product.

    Inside the encoder the state is kept layer first, `(E, B, P, D)`, so that a slice of layers is one block.

    Parameters are stacked by layer. Prefix projection after P-tuning v2 (arXiv 2110.07602), update gate after
    MemBART (arXiv 2209.07634).
    """

    def __init__(self, config: RecurrentBartConfig):
        super().__init__()
        n_layers, n_slots, width = config.encoder_layers, config.pre_seq_len, config.d_model
        self.n_heads = config.encoder_attention_heads
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.has_projection, self.has_update_gate = config.prefix_projection, config.update_gate
        self.initial_memory = nn.Parameter(torch.empty(n_layers, n_slots, width))
        self.slot_embedding = nn.Parameter(torch.empty(n_slots, width))
        if self.has_projection:
            hidden = config.prefix_hidden_size
            self.projection_in = nn.Parameter(torch.empty(n_layers, width, hidden))
            self.projection_in_bias = nn.Parameter(torch.empty(n_layers, 1, hidden))
            self.projection_out = nn.Parameter(torch.empty(n_layers, hidden, 2 * width))
            self.projection_out_bias = nn.Parameter(torch.empty(n_layers, 1, 2 * width))
        if self.has_update_gate:
            self.update_gate = nn.Parameter(torch.empty(n_layers, 2 * width, width))
            self.update_gate_bias = nn.Parameter(torch.empty(n_layers, 1, width))
        if config.prefix_attention == "gated":
            self.prefix_gate = nn.Parameter(torch.empty(n_layers, self.n_heads))

    def init_weights(self, std: float) -> None:
        """Embedding scale for weights, zero for biases and for the gate that opens the prefix."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "prefix_gate":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def start(self, state: RecurrentState | None, n_documents: int) -> Tensor:
        """State `(E, B, P, D)` before the first segment: the learned one, or a given one continued.

        To a given one the learned one is added zero times: a parameter that gets no gradient at all in a step would
        be given the one of the step before by ZeRO-3.
        """
        learned = self.initial_memory.unsqueeze(1).expand(-1, n_documents, -1, -1)
        return learned if state is None else state.memory.transpose(0, 1) + 0.0 * learned

    def cut(self, memory_EBPD: Tensor, start_EBPD: Tensor, is_started_B: Tensor) -> Tensor:
        """The state without its history, except where the document has none yet: there it is the start itself."""
        return torch.where(is_started_B.view(1, -1, 1, 1), memory_EBPD.detach(), start_EBPD)

    def project(self, memory_EBPD: Tensor, layers: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `(B, H, P, K)` that each layer's next segment reads."""
        if self.has_projection:
            hidden = torch.tanh(self._per_layer(memory_EBPD, self.projection_in, self.projection_in_bias))
            both = self._per_layer(hidden, self.projection_out, self.projection_out_bias)
            pairs = [both_BP2D.chunk(2, dim=-1) for both_BP2D in both]
        else:
            pairs = [_own_projection(layer, memory) for layer, memory in zip(layers, memory_EBPD, strict=True)]
        return [(self._heads(self.dropout(key)), self._heads(self.dropout(value))) for key, value in pairs]

    def update(self, memory_EBPD: Tensor, slots_EBPD: Tensor, is_read_B: Tensor) -> Tensor:
        """State after a segment; a document that has no text in it keeps its state unchanged."""
        new = slots_EBPD
        if self.has_update_gate:
            both = torch.cat([memory_EBPD, slots_EBPD], dim=-1)
            gate = torch.sigmoid(self._per_layer(both, self.update_gate, self.update_gate_bias))
            new = memory_EBPD + gate * (slots_EBPD - memory_EBPD)
        return torch.where(is_read_B.view(1, -1, 1, 1), new, memory_EBPD)

    def _per_layer(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Each layer's linear map, `(E, B, P, in)` to `(E, B, P, out)`, as one batched product."""
        n_layers, n_documents, n_slots, _ = hidden.shape
        mapped = torch.baddbmm(bias, hidden.reshape(n_layers, n_documents * n_slots, -1), weight)
        return mapped.view(n_layers, n_documents, n_slots, -1)

    def _heads(self, hidden_BPD: Tensor) -> Tensor:
        return hidden_BPD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def _own_projection(layer: BartEncoderLayer, memory_BPD: Tensor) -> tuple[Tensor, Tensor]:
    return layer.self_attn.k_proj(memory_BPD), layer.self_attn.v_proj(memory_BPD)
