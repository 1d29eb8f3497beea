"""Cells (segment, layer) of a wavefront diagonal, computed by fused kernels between the matrix products."""

# Slots are the P positions in front of a segment's tokens that write the state. A stream tensor holds hidden states.
# Shape suffixes: B documents, R = layers * documents, S = slots and tokens of a segment, P prefix length (= slots),
# E encoder layers (of a diagonal), M rows of a layer, H heads, D model width, X = 3 * D.

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.bart.modeling_bart import BartAttention, BartEncoderLayer

from recurrent_bart.execution.stacked_layers import StackedLayers
from recurrent_bart.recurrence.attention import attend, gated_read
from recurrent_bart.recurrence.cell import AttentionMasks, normalizes_before
from recurrent_bart.recurrence.grouped_linear import linear, linear_with_input
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence, Weights

if TYPE_CHECKING:
    from recurrent_bart.execution.kernels.heads import Heads


def can_fuse(layer: BartEncoderLayer, stream: Tensor) -> bool:
    """Return True if fused kernels support the layer: on a GPU, with a carried state, GELU, and no autocast."""
    config, activation = layer.self_attn.config, layer.activation_fn
    return (
        stream.is_cuda
        and importlib.util.find_spec("triton") is not None
        and config.has_state
        and not config.associative_memory
        # the exact GELU, not the tanh approximation
        and isinstance(activation, GELUActivation)
        and activation.act is nn.functional.gelu
        and stream.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not torch.is_autocast_enabled("cuda")
    )


def fused_cell(
    layers: StackedLayers,
    recurrence: PrefixRecurrence,
    stream_EBSD: Tensor,
    state_EBPD: Tensor,
    visible: AttentionMasks,
    is_read_EB: Tensor | None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `diagonal_step` with fused kernels; results differ by rounding only. Arguments are the same."""
    weights = layers.weights
    n_layers, n_documents, _, width = stream_EBSD.shape
    prefix, prefix_bias, state_EMD = _project(recurrence, weights, state_EBPD.reshape(n_layers, -1, width))
    qkv, stream_EMD = _query_key_value(layers, stream_EBSD.flatten(1, 2))
    read = _attention(layers, recurrence, qkv, n_documents, visible, prefix, prefix_bias)
    stream_EMD, hidden = _feed_forward(layers, stream_EMD, read)
    memory_beside = state_EMD if recurrence.has_update_gate else None
    stream_out, memory_out = (None, None) if into is None else (into[0].flatten(1, 2), into[1])
    sizes = n_documents, visible.n_slots
    stream_EMD, slots = _last_sum(layers, stream_EMD, hidden, *sizes, memory_beside, stream_out)
    state_EBPD = state_EMD.view_as(state_EBPD)
    state_EBPD = _next_memory(recurrence, weights, state_EBPD, slots, is_read_EB, memory_out)
    return stream_EMD.view_as(stream_EBSD), state_EBPD


def _query_key_value(layers: StackedLayers, stream_EMD: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values without bias, and the unchanged stream."""
    # kernels are imported in functions, because a CPU installation may lack Triton
    from recurrent_bart.execution.kernels.residual_norm import norm_with_input

    weights, name = layers.weights, "self_attn_layer_norm"
    if not normalizes_before(layers.shared):
        return linear_with_input(stream_EMD, weights["query_key_value"])
    norm = weights[name], weights[f"{name}_bias"], layers.epsilon(name)
    attended_EMD, stream_EMD = norm_with_input(stream_EMD, *norm)
    return linear(attended_EMD, weights["query_key_value"]), stream_EMD


def _feed_forward(layers: StackedLayers, stream_EMD: Tensor, read_EMD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states after attention, and the feed-forward block's output without bias.

    `read_EMD` is the output of attention without bias.
    """
    from recurrent_bart.execution.kernels.residual_norm import residual_norm, residual_norm_and_sum

    weights = layers.weights
    if normalizes_before(layers.shared):
        affine = _norm_of(layers, "out_proj", "final_layer_norm")
        normed_EMD, stream_EMD = residual_norm_and_sum(stream_EMD, read_EMD, *affine)
        hidden = linear(normed_EMD, weights["fc1"])
    else:
        stream_EMD = residual_norm(stream_EMD, read_EMD, *_norm_of(layers, "out_proj", "self_attn_layer_norm"))
        hidden, stream_EMD = linear_with_input(stream_EMD, weights["fc1"])
    return stream_EMD, _activated(layers, hidden)


def _last_sum(
    layers: StackedLayers,
    stream_EMD: Tensor,
    hidden_EMD: Tensor,
    n_documents: int,
    n_slots: int,
    memory: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden states that leave the layers, and the slots as the second output of `residual_norm_and_slots`.

    `stream_EMD` and `hidden_EMD` are the outputs of `_feed_forward`.
    """
    from recurrent_bart.execution.kernels.residual_norm import residual_norm_and_slots
    from recurrent_bart.execution.kernels.residual_sum import residual_sum_and_slots

    given = n_documents, n_slots, memory, out
    if normalizes_before(layers.shared):
        return residual_sum_and_slots(stream_EMD, hidden_EMD, *_norm_of(layers, "fc2", "state_norm"), *given)
    return residual_norm_and_slots(stream_EMD, hidden_EMD, *_norm_of(layers, "fc2", "final_layer_norm"), *given)


def _norm_of(layers: StackedLayers, hidden: str, name: str) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Return the arguments of `residual_norm` after the map `hidden`: biases, weight, epsilon and dropout rate."""
    shared, weights = layers.shared, layers.weights
    biases = weights[f"{hidden}_bias"], weights[f"{name}_bias"]
    return biases[0], weights[name], biases[1], layers.epsilon(name), shared.dropout if shared.training else 0.0


def _activated(layers: StackedLayers, hidden: Tensor) -> Tensor:
    """Return the feed-forward block's output without bias, from the first map's output without bias."""
    from recurrent_bart.execution.kernels.bias_activation import bias_gelu

    shared, weights = layers.shared, layers.weights
    hidden = bias_gelu(hidden, weights["fc1_bias"])
    hidden = nn.functional.dropout(hidden, p=shared.activation_dropout, training=shared.training)
    return linear(hidden, weights["fc2"])


def _attention(
    layers: StackedLayers,
    recurrence: PrefixRecurrence,
    qkv: Tensor,
    n_documents: int,
    visible: AttentionMasks,
    prefix: Tensor,
    prefix_bias: Tensor,
) -> Tensor:
    """Return attention's output `(E, M, D)` without bias; `qkv` and `prefix` are projections without bias."""
    from recurrent_bart.execution.kernels.heads import split_heads

    weights, (n_layers, n_rows, _) = layers.weights, qkv.shape
    qkv_RSX = qkv.view(n_layers * n_documents, -1, qkv.shape[-1])
    prefix_dropout = recurrence.dropout.p if recurrence.dropout.training else 0.0
    heads = split_heads(
        qkv_RSX, weights["query_key_value_bias"], prefix, prefix_bias,
        recurrence.n_heads, "prefix_gate" in weights, prefix_dropout,
    )  # fmt: skip
    read_RSD = _attend(layers.shared.self_attn, heads, visible, weights.get("prefix_gate"))
    return linear(read_RSD.view(n_layers, n_rows, -1), weights["out_proj"])


def _project(recurrence: PrefixRecurrence, weights: Weights, state_EMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return prefix keys and values `(E, M, 2 * D)` without bias, the bias, and the unchanged states."""
    from recurrent_bart.execution.kernels.bias_activation import bias_tanh

    if not recurrence.has_projection:
        columns = slice(state_EMD.shape[-1], None)
        both, state_EMD = linear_with_input(state_EMD, weights["query_key_value"], columns)
        return both, weights["query_key_value_bias"][..., columns], state_EMD
    inside, state_EMD = linear_with_input(state_EMD, weights["projection_in"])
    inside = bias_tanh(inside, weights["projection_in_bias"])
    return linear(inside, weights["projection_out"]), weights["projection_out_bias"], state_EMD


def _attend(attention: BartAttention, heads: "Heads", visible: AttentionMasks, gate_EH: Tensor | None) -> Tensor:
    from recurrent_bart.execution.kernels.gated_prefix import add_prefix_read

    slots_read, _ = attend(attention, heads.slots_query, (heads.slots_key, heads.slots_value), visible.slots)
    tokens_read, _ = attend(attention, heads.tokens_query, (heads.tokens_key, heads.tokens_value), visible.tokens)
    if gate_EH is not None:
        if not (attention.dropout and attention.training):
            return add_prefix_read(slots_read, tokens_read, *heads[6:], gate_EH, attention.scaling)
        prefix_read = attend(attention, heads.prefix_query, (heads.prefix_key, heads.prefix_value), None)
        gate_RH = gate_EH.repeat_interleave(len(slots_read) // len(gate_EH), dim=0)
        tokens_read, _ = gated_read((tokens_read, None), prefix_read, gate_RH)
    return torch.cat([slots_read, tokens_read], dim=1).flatten(2)


def _next_memory(
    recurrence: PrefixRecurrence,
    weights: Weights,
    state_EBPD: Tensor,
    slots: Tensor,
    is_read_EB: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Return the new states; `slots` is as the second output of `residual_norm_and_slots`."""
    from recurrent_bart.execution.kernels.gated_update import gated_update

    if recurrence.has_update_gate:
        gate, both = linear_with_input(slots, weights["update_gate"])
        rows_out = None if out is None else out.flatten(1, 2)
        return gated_update(gate, weights["update_gate_bias"], both, is_read_EB, rows_out).view_as(state_EBPD)
    new = recurrence.next_state(state_EBPD, slots, is_read_EB, weights)
    return new if out is None else out.copy_(new)
