"""The core: a state, its projection to each layer's key/value prefix, its update from the slots.

Shape suffixes: B documents, P prefix length (= slots), E encoder layers (of a state: 1 with `recurrence="top"`),
A attended length, H heads, K head width, D model width, S = slots and tokens of a segment, R = layers * documents.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.associative_memory import Matrix, as_rows, from_rows
from recurrent_bart.recurrence.grouped_linear import StackedWeightSlice, linear

KeyValue = tuple[Tensor, Tensor]
# tensors of several layers by name, stacked by layer; of a map also a `StackedWeightSlice`
Weights = Mapping[str, Any]
# parameters of all layers together
SHARED = ("initial_memory", "slot_embedding")
# gives a layer's prefix by the layer's number and the slots (B, P, D) that enter it
PrefixReader = Callable[[int, Tensor], KeyValue]


@dataclass
class RecurrentState(ModelOutput):
    """What has been read so far; goes into `forward` and `generate` and comes out again.

    A dictionary of tensors, each with a row per document: Hugging Face and accelerate can gather it over processes.

    Attributes:
        position: `(B,)`, number of segments read; a document at 0 begins with the learned first state.
        memory: `(B, E, P, D)`, the state of every layer; None where nothing is carried. With `associative_memory`
            its matrices are further rows, `(B, E, P + K, D)`.
        context: `(B, A, D)`, what the decoder attends to of segments before the next, with `decoder_context` other
            than `"last"`.
        context_number: `(B, A)`, which segment of its document that is of, counted from 1; 0: nothing.
    """

    position: Tensor
    memory: Tensor | None = None
    context: Tensor | None = None
    context_number: Tensor | None = None

    @classmethod
    def unread(
        cls, config: RecurrentBartConfig, n_documents: int, device: torch.device | str = "cpu"
    ) -> "RecurrentState":
        """The state before anything is read."""
        shape = cls.memory_shape(config, n_documents)
        memory = None if shape is None else torch.zeros(shape, device=device)
        return cls(torch.zeros(n_documents, dtype=torch.long, device=device), memory)

    @staticmethod
    def memory_shape(config: RecurrentBartConfig, n_documents: int) -> tuple[int, ...] | None:
        """Return the shape of `memory`; None where nothing is carried."""
        if not config.has_state:
            return None
        n_states = config.encoder_layers if config.recurrence == "layerwise" else 1
        return n_documents, n_states, config.n_state_rows, config.d_model

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, to be written to a file."""
        return dict(self.items())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "RecurrentState":
        """What `tensors` gave."""
        return cls(**tensors)

    def carries_anything(self) -> bool:
        """Return True if the next segment reads anything of the segments before it."""
        return self.memory is not None or self.context is not None

    def check(self, config: RecurrentBartConfig, n_documents: int) -> None:
        """Refuse a state of another model or of another number of documents, which could broadcast.

        Raises:
            ValueError: A tensor has another shape; the message names the tensor.
        """
        for name, tensor in self.items():
            if len(tensor) != n_documents:
                raise ValueError(f"state: {name} is of {len(tensor)} documents, the batch has {n_documents}")
        found, needed = (
            self.memory if self.memory is None else tuple(self.memory.shape),
            self.memory_shape(config, n_documents),
        )
        if found != needed:
            raise ValueError(f"state: memory has shape {found}, this model's has shape {needed}")

    def detach(self) -> "RecurrentState":
        """The same numbers without their history."""
        return self._each(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "RecurrentState":
        """Move it as `Tensor.to` does; a dtype applies to floating-point tensors alone."""
        probe = torch.empty(0).to(*args, **kwargs)
        return self._each(lambda tensor: tensor.to(probe if tensor.is_floating_point() else probe.device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "RecurrentState":
        return RecurrentState(**{name: change(tensor) for name, tensor in self.tensors().items()})


class PrefixRecurrence(nn.Module):
    """State and slots in, new state and next keys and values out, all layers in one batched matrix product.

    This class is `recurrence="layerwise"`: every layer has a state, which it reads as its prefix and writes from its
    own slots. The other recurrences say where they differ.

    Inside the encoder the state is kept layer first, `(E, B, P, D)`, so that a slice of layers is one block.
    Parameters are stacked by layer. Prefix projection after P-tuning v2 (arXiv 2110.07602), update gate after
    MemBART (arXiv 2209.07634).

    Attributes:
        slots_read_prefix: Whether slots attend to the prefix, beside slots and tokens.
    """

    slots_read_prefix = True

    def __init__(self, config: RecurrentBartConfig):
        super().__init__()
        n_layers, width = config.encoder_layers, config.d_model
        n_states = self.n_states(config)
        self.n_slots = config.pre_seq_len
        self.n_heads = config.encoder_attention_heads
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.has_projection, self.has_update_gate = config.prefix_projection, config.update_gate and config.has_state
        self.initial_memory = nn.Parameter(torch.empty(n_states, config.pre_seq_len, width))
        if self.has_projection:
            hidden = config.prefix_hidden_size
            self.projection_in = nn.Parameter(torch.empty(n_layers, width, hidden))
            self.projection_in_bias = nn.Parameter(torch.empty(n_layers, 1, hidden))
            self.projection_out = nn.Parameter(torch.empty(n_layers, hidden, 2 * width))
            self.projection_out_bias = nn.Parameter(torch.empty(n_layers, 1, 2 * width))
        if self.has_update_gate:
            self.update_gate = nn.Parameter(torch.empty(n_states, 2 * width, width))
            self.update_gate_bias = nn.Parameter(torch.empty(n_states, 1, width))
        if config.prefix_attention == "gated":
            self.prefix_gate = nn.Parameter(torch.empty(n_layers, self.n_heads))
        self.n_matrix_rows = config.n_state_rows - config.pre_seq_len
        if self.n_matrix_rows:
            self.matrix_gate = nn.Parameter(torch.empty(n_layers, self.n_heads))
            self.write_strength = nn.Parameter(torch.empty(n_layers, width, self.n_heads))
            self.write_strength_bias = nn.Parameter(torch.empty(n_layers, 1, self.n_heads))
        self._build_slots(config)
        # FSDP replaces parameters by other tensors
        self.stacked_names = [name for name, _ in self.named_parameters() if name not in SHARED]

    def forward(self, device: torch.device) -> "PrefixRecurrence":
        """Return the recurrence with its parameters on a device, for use until the encoder's call ends.

        accelerate brings offloaded parameters for a call of `forward` alone; all else here are other methods.
        """
        if not hasattr(self, "_hf_hook") and all(parameter.device == device for parameter in self.parameters()):
            return self
        there = copy.copy(self)
        there.__dict__["_parameters"] = {name: parameter.to(device) for name, parameter in self.named_parameters()}
        return there

    def n_states(self, config: RecurrentBartConfig) -> int:
        """Number of states carried."""
        return config.encoder_layers

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        self.slot_embedding = nn.Parameter(torch.empty(config.pre_seq_len, config.d_model))

    def init_weights(self, std: float, matrix_gate: float) -> None:
        """Embedding scale for weights, zero for biases and for the gates on the prefix; those on matrices are given."""
        for name, parameter in self.named_parameters():
            if name == "matrix_gate":
                init.constant_(parameter, matrix_gate)
            elif name.endswith("bias") or name == "prefix_gate":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def initial_state_memory(self, n_documents: int) -> Tensor:
        """The learned state `(E, B, P, D)` before the first segment, without anything in a matrix."""
        first_EBPD = self.initial_memory.unsqueeze(1).expand(-1, n_documents, -1, -1)
        return nn.functional.pad(first_EBPD, (0, 0, 0, self.n_matrix_rows)) if self.n_matrix_rows else first_EBPD

    def slots(self, memory_EBPD: Tensor) -> Tensor:
        """Slots `(B, P, D)` that enter below the first layer."""
        return self.slot_embedding.expand(memory_EBPD.shape[1], -1, -1)

    def by_layer(self) -> Weights:
        """What every layer has of its own, stacked by layer."""
        return {name: getattr(self, name) for name in self.stacked_names}

    def prefix_reader(self, memory_EBPD: Tensor, layers: nn.ModuleList) -> PrefixReader:
        """The prefix of each layer for one segment."""
        weights = self.by_layer()
        if not self.has_projection:
            # by a layer's own maps, and only while the layer runs: FSDP has its parameters no longer
            return lambda layer_idx, slots_BPD: self._project_one(
                layer_idx, memory_EBPD[layer_idx].to(slots_BPD.device), weights, layers
            )
        key, value = self.project(memory_EBPD, weights, functools.partial(_own_projection, layers))
        return lambda layer_idx, slots_BPD: (key[layer_idx].to(slots_BPD.device), value[layer_idx].to(slots_BPD.device))

    def _project_one(self, layer_idx: int, memory_BPD: Tensor, weights: Weights, layers: nn.ModuleList) -> KeyValue:
        """Return keys and values `(B, H, P, K)` of one layer from the layer's state."""
        own = slice(layer_idx, layer_idx + 1)
        own_weights = {name: weight[own] for name, weight in weights.items()}
        key, value = self.project(memory_BPD.unsqueeze(0), own_weights, functools.partial(_own_projection, layers[own]))
        return key[0], value[0]

    def project(self, memory_EBPD: Tensor, weights: Weights, own: Callable[[Tensor], KeyValue]) -> KeyValue:
        """Keys and values `(E, B, H, P, K)` of the layers that have these states.

        Args:
            memory_EBPD: Their states.
            weights: What `by_layer` gives of them.
            own: The layers' own projections to keys and values `(E, B, P, D)`.
        """
        memory_EBPD = self.without_matrix(memory_EBPD)
        if self.has_projection:
            hidden = torch.tanh(per_layer(memory_EBPD, weights["projection_in"], weights["projection_in_bias"]))
            both = per_layer(hidden, weights["projection_out"], weights["projection_out_bias"])
            key, value = both.chunk(2, dim=-1)
        else:
            key, value = own(memory_EBPD)
        return self._heads(self.dropout(key)), self._heads(self.dropout(value))

    def without_matrix(self, memory_EBPD: Tensor) -> Tensor:
        """Of a state what slots have written."""
        return memory_EBPD[:, :, : -self.n_matrix_rows] if self.n_matrix_rows else memory_EBPD

    def matrix(
        self, memory_EBPD: Tensor, stream_EBSD: Tensor, is_token_RL: Tensor | None, weights: Weights
    ) -> Matrix | None:
        """The associative memory of the layers that have these states, for a segment; None: there is none.

        Args:
            memory_EBPD: Their states.
            stream_EBSD: Slots and tokens that enter them.
            is_token_RL: False at padding; None: nowhere.
            weights: What `by_layer` gives of them.
        """
        if not self.n_matrix_rows:
            return None
        tokens_EBLD = stream_EBSD[:, :, self.n_slots :]
        strength_EBLH = per_layer(tokens_EBLD, weights["write_strength"], weights["write_strength_bias"])
        strength_RLH = torch.sigmoid(strength_EBLH).flatten(0, 1)
        if is_token_RL is not None:
            strength_RLH = strength_RLH * is_token_RL.unsqueeze(-1)
        gate_RH = weights["matrix_gate"].repeat_interleave(stream_EBSD.shape[1], dim=0)
        return Matrix(from_rows(memory_EBPD[:, :, -self.n_matrix_rows :]), gate_RH, strength_RLH)

    def next_memory(
        self,
        memory_EBPD: Tensor,
        slots_EBPD: Tensor,
        is_read_EB: Tensor | None,
        weights: Weights,
        written_RHKK: Tensor | None = None,
    ) -> Tensor:
        """State after a segment; a document that has no text in it keeps its state unchanged.

        Args:
            memory_EBPD: State before it.
            slots_EBPD: Slots that leave each layer.
            is_read_EB: False where the document has no text in the segment that the layer is at; None: nowhere.
            weights: What `by_layer` gives of these layers.
            written_RHKK: Matrices after the segment, of an associative memory.
        """
        new, old_EBPD = slots_EBPD, self.without_matrix(memory_EBPD)
        if self.has_update_gate:
            both = torch.cat([old_EBPD, slots_EBPD], dim=-1)
            gate = torch.sigmoid(per_layer(both, weights["update_gate"], weights["update_gate_bias"]))
            new = old_EBPD + gate * (slots_EBPD - old_EBPD)
        if written_RHKK is not None:
            new = torch.cat([new, as_rows(written_RHKK, len(new)).to(new.dtype)], dim=2)
        return new if is_read_EB is None else torch.where(is_read_EB[:, :, None, None], new, memory_EBPD)

    def _heads(self, hidden_EBPD: Tensor) -> Tensor:
        return hidden_EBPD.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)


class TopRecurrence(PrefixRecurrence):
    """Identical to PrefixRecurrence except: one state is the slots, bottom to top (RMT, arXiv 2207.06881).

    Layers read the slots that enter them as their prefix. Without projection and with `prefix_attention="concat"` that
    is BART's attention over `memory, tokens`.
    """

    slots_read_prefix = False

    def n_states(self, config: RecurrentBartConfig) -> int:
        """One, whatever the number of layers."""
        return 1

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        """The state is the slots."""

    def slots(self, memory_EBPD: Tensor) -> Tensor:
        """The state itself."""
        return memory_EBPD[0]

    def prefix_reader(self, memory_EBPD: Tensor, layers: nn.ModuleList) -> PrefixReader:
        """The prefix of each layer, made of the slots that have come up to it."""
        weights = self.by_layer()
        return lambda layer_idx, slots_BPD: self._project_one(layer_idx, slots_BPD, weights, layers)


class StaticPrefix(PrefixRecurrence):
    """Identical to PrefixRecurrence except: no slots, so the prefix stays the learned one (P-tuning v2)."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        self.n_slots = 0

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        """Nothing is written."""

    def slots(self, memory_EBPD: Tensor) -> Tensor:
        """No slot."""
        return memory_EBPD[0, :, :0]

    def next_memory(self, memory_EBPD: Tensor, *_: Any, **__: Any) -> Tensor:
        """The same prefix again."""
        return memory_EBPD


def build_recurrence(config: RecurrentBartConfig) -> PrefixRecurrence | None:
    """The recurrence that a configuration names; None where `pre_seq_len` is 0."""
    if not config.pre_seq_len:
        return None
    return {"layerwise": PrefixRecurrence, "top": TopRecurrence, "none": StaticPrefix}[config.recurrence](config)


def per_layer(hidden_EBPD: Tensor, weight: Tensor | StackedWeightSlice, bias: Tensor) -> Tensor:
    """Each layer's linear map, `(E, B, P, in)` to `(E, B, P, out)`, as one batched product."""
    n_layers, n_documents, n_slots, _ = hidden_EBPD.shape
    mapped = linear(hidden_EBPD.reshape(n_layers, n_documents * n_slots, -1), weight, bias)
    return mapped.view(n_layers, n_documents, n_slots, -1)


def _own_projection(layers: Iterable[Any], memory_EBPD: Tensor) -> KeyValue:
    attentions = [layer.self_attn for layer in layers]
    keys = [attention.k_proj(memory) for attention, memory in zip(attentions, memory_EBPD, strict=True)]
    values = [attention.v_proj(memory) for attention, memory in zip(attentions, memory_EBPD, strict=True)]
    return torch.stack(keys), torch.stack(values)
