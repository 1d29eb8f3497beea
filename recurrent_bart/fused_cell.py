"""A diagonal's cells with few passes over memory between their matrix products.

Shape suffixes: R = layers * documents, S = slots and tokens of a segment, E encoder layers (of a diagonal), D model
width.
"""

import importlib.util

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.encoder_cell import Visibility
from recurrent_bart.layer_spans import linear
from recurrent_bart.prefix_attention import attend, gated_read
from recurrent_bart.prefix_recurrence import KeyValue
from recurrent_bart.stacked_layers import StackedLayers


def can_fuse(config: RecurrentBartConfig, stream: Tensor) -> bool:
    """Whether there are kernels for such cells: on a GPU, of slots that read a prefix, in one type throughout."""
    return (
        stream.is_cuda
        and importlib.util.find_spec("triton") is not None
        and config.has_state
        and config.activation_function == "gelu"
        and stream.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not torch.is_autocast_enabled("cuda")
    )


def fused_cell(
    layers: StackedLayers, stream_RSD: Tensor, visible: Visibility, prefix: KeyValue, gate_RH: Tensor | None
) -> Tensor:
    """As `encoder_cell`, whose numbers it gives but for rounding, of several layers; the stream above them."""
    # else a processor without Triton could not import this
    from recurrent_bart.kernels.bias_gelu import bias_gelu
    from recurrent_bart.kernels.gated_prefix import add_prefix_read
    from recurrent_bart.kernels.heads import split_heads
    from recurrent_bart.kernels.residual_norm import residual_norm

    shared, weights = layers.shared, layers.weights
    dropout = shared.dropout if shared.training else 0.0

    def by_layer(rows: Tensor) -> Tensor:
        return rows.view(len(weights["fc1_bias"]), -1, rows.shape[-1])

    def norm(stream_EMD: Tensor, hidden_EMD: Tensor, hidden: str, name: str) -> Tensor:
        affine = weights[f"{hidden}_bias"], weights[name], weights[f"{name}_bias"]
        return residual_norm(stream_EMD, hidden_EMD, *affine, getattr(shared, name).eps, dropout)

    qkv = linear(by_layer(stream_RSD), weights["query_key_value"]).view(*stream_RSD.shape[:2], -1)
    heads = split_heads(qkv, weights["query_key_value_bias"], *prefix, gate_RH is not None)
    attention = shared.self_attn
    slots_read, _ = attend(attention, heads.slots_query, (heads.slots_key, heads.slots_value), visible.slots)
    tokens_read, _ = attend(attention, heads.tokens_query, (heads.tokens_key, heads.tokens_value), visible.tokens)
    if gate_RH is None:
        read_RSD = torch.cat([slots_read, tokens_read], dim=1).flatten(2)
    elif attention.dropout and attention.training:
        prefix_read = attend(attention, heads.prefix_query, (heads.prefix_key, heads.prefix_value), None)
        tokens_read, _ = gated_read((tokens_read, None), prefix_read, gate_RH)
        read_RSD = torch.cat([slots_read, tokens_read], dim=1).flatten(2)
    else:
        read_RSD = add_prefix_read(slots_read, tokens_read, *heads[6:], gate_RH, attention.scaling)
    stream_EMD = norm(
        by_layer(stream_RSD), linear(by_layer(read_RSD), weights["out_proj"]), "out_proj", "self_attn_layer_norm"
    )
    hidden = bias_gelu(linear(stream_EMD, weights["fc1"]), weights["fc1_bias"])
    hidden = nn.functional.dropout(hidden, p=shared.activation_dropout, training=shared.training)
    stream_EMD = norm(stream_EMD, linear(hidden, weights["fc2"]), "fc2", "final_layer_norm")
    return stream_EMD.view_as(stream_RSD)
