"""State carried between segments: its projection to a prefix of keys and values, and its update from slots."""

# Slots are the P positions in front of a segment's tokens that write the next state.
# Shape suffixes: B documents, P prefix length (= slots), E encoder layers (of a state: 1 with `recurrence="top"`),
# A attended length, H heads, K head width, D model width, L tokens in a segment, S = slots and tokens of a segment,
# R = layers * documents.

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
# tensors of several layers by name, stacked by layer; a map may be a `StackedWeightSlice`
Weights = Mapping[str, Any]
# parameters that are not stacked by layer
SHARED = ("initial_memory", "slot_embedding")
# returns a layer's prefix from the layer's index and the slots (B, P, D) that enter the layer
PrefixReader = Callable[[int, Tensor], KeyValue]


@dataclass
class RecurrentState(ModelOutput):
    """State after the segments read so far; `forward` and `generate` accept a state, and `forward` returns one.

    A state is a dictionary of tensors with one row per document. Hugging Face and accelerate can gather it over ranks.

    Attributes:
        position: `(B,)`, number of segments read; a document at 0 starts from the learned initial state.
        memory: `(B, E, P, D)`, states of all layers, or None without a carried state. `associative_memory` appends its
            matrices as rows: `(B, E, P + K, D)`.
        context: `(B, A, D)`, encoder outputs of earlier segments for the decoder, unless `decoder_context="last"`.
        context_number: `(B, A)`, index from 1 of the segment that each context position comes from; 0 marks padding.
            Negative: the position leaves the context when the document reads another segment.
        tokens: `(B, A, D)`, encoder outputs of each document's last segment, with `decoder_context` `"last"` or
            `"memory"`.
        tokens_mask: `(B, A)` booleans, False at padding of `tokens`.
    """

    position: Tensor
    memory: Tensor | None = None
    context: Tensor | None = None
    context_number: Tensor | None = None
    tokens: Tensor | None = None
    tokens_mask: Tensor | None = None

    @classmethod
    def unread(
        cls, config: RecurrentBartConfig, n_documents: int, device: torch.device | str = "cpu"
    ) -> "RecurrentState":
        """Return the state before the first segment."""
        shape = cls.memory_shape(config, n_documents)
        memory = None if shape is None else torch.zeros(shape, device=device)
        return cls(torch.zeros(n_documents, dtype=torch.long, device=device), memory)

    @staticmethod
    def memory_shape(config: RecurrentBartConfig, n_documents: int) -> tuple[int, ...] | None:
        """Return the shape of `memory`, or None without a carried state."""
        if not config.has_state:
            return None
        n_states = config.encoder_layers if config.recurrence == "layerwise" else 1
        return n_documents, n_states, config.n_state_rows, config.d_model

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for saving to a file."""
        return dict(self.items())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "RecurrentState":
        """Build a state from the result of `tensors`."""
        return cls(**tensors)

    def carries_anything(self) -> bool:
        """Return True if the state holds information from earlier segments."""
        return self.memory is not None or self.context is not None

    def has_context(self) -> Tensor:
        """Return `(B,)`, True where the state holds a context of the document for the decoder."""
        is_held = self.tokens is not None or self.context is not None
        return (self.position > 0) & is_held

    def check(self, config: RecurrentBartConfig, n_documents: int) -> None:
        """Check that the state fits the model and the batch; a wrong shape could broadcast silently.

        Raises:
            ValueError: A tensor has another shape; the message names the tensor.
        """
        for name, tensor in self.items():
            if len(tensor) != n_documents:
                raise ValueError(f"state: {name} has {len(tensor)} documents, but the batch has {n_documents}")
        found, needed = (
            self.memory if self.memory is None else tuple(self.memory.shape),
            self.memory_shape(config, n_documents),
        )
        if found != needed:
            raise ValueError(f"state: memory has shape {found}, but this model needs {needed}")

    def detach(self) -> "RecurrentState":
        """Return the state detached from the autograd graph."""
        return self._each(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "RecurrentState":
        """Move the state as `Tensor.to` does; a dtype applies to floating-point tensors only."""
        probe = torch.empty(0).to(*args, **kwargs)
        return self._each(lambda tensor: tensor.to(probe if tensor.is_floating_point() else probe.device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "RecurrentState":
        return RecurrentState(**{name: change(tensor) for name, tensor in self.tensors().items()})


class PrefixRecurrence(nn.Module):
    """Recurrence of all layers: projects states to prefixes, and updates states from slots, as batched products.

    This class implements `recurrence="layerwise"`: each layer has its own state, attends to it as a prefix, and updates
    it from the layer's slots. Inside the encoder a state is `(E, B, P, D)`, so a slice of layers is contiguous. Prefix
    projection follows P-tuning v2 (arXiv 2110.07602), the update gate follows MemBART (arXiv 2209.07634).
    """

    # True if slots attend to the prefix as well as to slots and tokens
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
        # stored here because FSDP replaces parameters by other tensors
        self.stacked_names = [name for name, _ in self.named_parameters() if name not in SHARED]

    def forward(self, device: torch.device) -> "PrefixRecurrence":
        """Return this module with its parameters on `device`; use the result only until the encoder's call ends.

        accelerate loads offloaded parameters only for a call of `forward`, not for the other methods.
        """
        if not hasattr(self, "_hf_hook") and all(parameter.device == device for parameter in self.parameters()):
            return self
        there = copy.copy(self)
        there.__dict__["_parameters"] = {name: parameter.to(device) for name, parameter in self.named_parameters()}
        return there

    def n_states(self, config: RecurrentBartConfig) -> int:
        """Return the number of states that are carried between segments."""
        return config.encoder_layers

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        self.slot_embedding = nn.Parameter(torch.empty(config.pre_seq_len, config.d_model))

    def init_weights(self, std: float, matrix_gate: float) -> None:
        """Set biases and prefix gates to 0, matrix gates to `matrix_gate`; draw other parameters from N(0, std)."""
        for name, parameter in self.named_parameters():
            if name == "matrix_gate":
                init.constant_(parameter, matrix_gate)
            elif name.endswith("bias") or name == "prefix_gate":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def initial_state(self, n_documents: int) -> Tensor:
        """Return the learned state `(E, B, P, D)` before the first segment, with zeros in the matrix rows."""
        first_EBPD = self.initial_memory.unsqueeze(1).expand(-1, n_documents, -1, -1)
        return nn.functional.pad(first_EBPD, (0, 0, 0, self.n_matrix_rows)) if self.n_matrix_rows else first_EBPD

    def slots(self, state_EBPD: Tensor) -> Tensor:
        """Return the slots `(B, P, D)` that enter the first layer."""
        return self.slot_embedding.expand(state_EBPD.shape[1], -1, -1)

    def by_layer(self) -> Weights:
        """Return the parameters that are stacked by layer."""
        return {name: getattr(self, name) for name in self.stacked_names}

    def prefix_reader(self, state_EBPD: Tensor, layers: nn.ModuleList) -> PrefixReader:
        """Return a function that gives each layer's prefix for one segment."""
        weights = self.by_layer()
        if not self.has_projection:
            # project while the layer runs: only then does FSDP hold the layer's parameters
            return lambda layer_idx, slots_BPD: self._project_one(
                layer_idx, state_EBPD[layer_idx].to(slots_BPD.device), weights, layers
            )
        key, value = self.project(state_EBPD, weights, functools.partial(_own_projection, layers))
        return lambda layer_idx, slots_BPD: (key[layer_idx].to(slots_BPD.device), value[layer_idx].to(slots_BPD.device))

    def _project_one(self, layer_idx: int, state_BPD: Tensor, weights: Weights, layers: nn.ModuleList) -> KeyValue:
        own = slice(layer_idx, layer_idx + 1)
        own_weights = {name: weight[own] for name, weight in weights.items()}
        key, value = self.project(state_BPD.unsqueeze(0), own_weights, functools.partial(_own_projection, layers[own]))
        return key[0], value[0]

    def project(self, state_EBPD: Tensor, weights: Weights, own: Callable[[Tensor], KeyValue]) -> KeyValue:
        """Project the states of some layers to keys and values, each `(E, B, H, P, K)`.

        `weights` holds the entries of `by_layer` for these layers. Without prefix projection, `own` applies the layers'
        own key and value maps and returns `(E, B, P, D)`.
        """
        state_EBPD = self.without_matrix(state_EBPD)
        if self.has_projection:
            hidden = torch.tanh(per_layer(state_EBPD, weights["projection_in"], weights["projection_in_bias"]))
            both = per_layer(hidden, weights["projection_out"], weights["projection_out_bias"])
            key, value = both.chunk(2, dim=-1)
        else:
            key, value = own(state_EBPD)
        return self._heads(self.dropout(key)), self._heads(self.dropout(value))

    def without_matrix(self, state_EBPD: Tensor) -> Tensor:
        """Return the rows of a state that slots write, without the rows of the associative memory."""
        return state_EBPD[:, :, : -self.n_matrix_rows] if self.n_matrix_rows else state_EBPD

    def matrix(
        self, state_EBPD: Tensor, stream_EBSD: Tensor, is_token_RL: Tensor | None, weights: Weights
    ) -> Matrix | None:
        """Return the associative memory of some layers for one segment, or None without associative memory.

        `stream_EBSD` holds the hidden states that the layers' attention reads. `is_token_RL` is False at padding (None:
        no padding). `weights` holds the entries of `by_layer` for these layers.
        """
        if not self.n_matrix_rows:
            return None
        tokens_EBLD = stream_EBSD[:, :, self.n_slots :]
        strength_EBLH = per_layer(tokens_EBLD, weights["write_strength"], weights["write_strength_bias"])
        strength_RLH = torch.sigmoid(strength_EBLH).flatten(0, 1)
        if is_token_RL is not None:
            strength_RLH = strength_RLH * is_token_RL.unsqueeze(-1)
        gate_RH = weights["matrix_gate"].repeat_interleave(stream_EBSD.shape[1], dim=0)
        return Matrix(from_rows(state_EBPD[:, :, -self.n_matrix_rows :]), gate_RH, strength_RLH)

    def matrix_of_layer(
        self, state_1BPD: Tensor, is_token_BL: Tensor | None, weights: Weights, stream_BSD: Tensor
    ) -> Matrix | None:
        """Return `matrix` of a single layer, whose attention reads `stream_BSD`."""
        return self.matrix(state_1BPD, stream_BSD.unsqueeze(0), is_token_BL, weights)

    def next_state(
        self,
        state_EBPD: Tensor,
        slots_EBPD: Tensor,
        is_read_EB: Tensor | None,
        weights: Weights,
        written_RHKK: Tensor | None = None,
    ) -> Tensor:
        """Return the state after a segment.

        Args:
            state_EBPD: State before the segment.
            slots_EBPD: Slots that leave each layer; with `normalize_before`, after the norm of the layer above or the
                final norm.
            is_read_EB: False where a document has no text in the layer's segment; there the state stays unchanged.
                None: all documents have text.
            weights: Entries of `by_layer` for these layers.
            written_RHKK: Matrices of an associative memory after the segment.
        """
        new, old_EBPD = slots_EBPD, self.without_matrix(state_EBPD)
        if self.has_update_gate:
            both = torch.cat([old_EBPD, slots_EBPD], dim=-1)
            gate = torch.sigmoid(per_layer(both, weights["update_gate"], weights["update_gate_bias"]))
            new = old_EBPD + gate * (slots_EBPD - old_EBPD)
        if written_RHKK is not None:
            new = torch.cat([new, as_rows(written_RHKK, len(new)).to(new.dtype)], dim=2)
        return new if is_read_EB is None else torch.where(is_read_EB[:, :, None, None], new, state_EBPD)

    def _heads(self, hidden_EBPD: Tensor) -> Tensor:
        return hidden_EBPD.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)


class TopRecurrence(PrefixRecurrence):
    """Recurrence with one state, which passes through all layers as the slots (RMT, arXiv 2207.06881).

    Each layer attends to the slots that enter the layer, as a prefix. Without prefix projection and with
    `prefix_attention="concat"`, the result is BART's attention over `memory, tokens`.
    """

    slots_read_prefix = False

    def n_states(self, config: RecurrentBartConfig) -> int:
        """Return 1 for any number of layers."""
        return 1

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        pass

    def slots(self, state_EBPD: Tensor) -> Tensor:
        """Return the state, which serves as the slots."""
        return state_EBPD[0]

    def prefix_reader(self, state_EBPD: Tensor, layers: nn.ModuleList) -> PrefixReader:
        """Return a function that projects the slots that enter a layer to the layer's prefix."""
        weights = self.by_layer()
        return lambda layer_idx, slots_BPD: self._project_one(layer_idx, slots_BPD, weights, layers)


class StaticPrefix(PrefixRecurrence):
    """Prefix without slots and without a state: all segments share a learned prefix (P-tuning v2)."""

    def __init__(self, config: RecurrentBartConfig):
        super().__init__(config)
        self.n_slots = 0

    def _build_slots(self, config: RecurrentBartConfig) -> None:
        pass

    def slots(self, state_EBPD: Tensor) -> Tensor:
        """Return an empty tensor `(B, 0, D)`."""
        return state_EBPD[0, :, :0]

    def next_state(self, state_EBPD: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the state unchanged."""
        return state_EBPD


def build_recurrence(config: RecurrentBartConfig) -> PrefixRecurrence | None:
    """Build the module that `config.recurrence` names; return None if `pre_seq_len` is 0."""
    if not config.pre_seq_len:
        return None
    return {"layerwise": PrefixRecurrence, "top": TopRecurrence, "none": StaticPrefix}[config.recurrence](config)


def per_layer(hidden_EBPD: Tensor, weight: Tensor | StackedWeightSlice, bias: Tensor) -> Tensor:
    """Apply each layer's linear map, `(E, B, P, in)` to `(E, B, P, out)`, as one batched product."""
    n_layers, n_documents, n_slots, _ = hidden_EBPD.shape
    mapped = linear(hidden_EBPD.reshape(n_layers, n_documents * n_slots, -1), weight, bias)
    return mapped.view(n_layers, n_documents, n_slots, -1)


def _own_projection(layers: Iterable[Any], state_EBPD: Tensor) -> KeyValue:
    attentions = [layer.self_attn for layer in layers]
    keys = [attention.k_proj(memory) for attention, memory in zip(attentions, state_EBPD, strict=True)]
    values = [attention.v_proj(memory) for attention, memory in zip(attentions, state_EBPD, strict=True)]
    return torch.stack(keys), torch.stack(values)
