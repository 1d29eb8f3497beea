"""Measurement of attention to the state: by encoder tokens (the prefix) and by the decoder (states in its context).

Shape suffixes: L tokens in a segment or querying tokens, A attended length, M state positions, E layers, H heads, K
head width, P prefix length, D model width, B documents.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.bart.modeling_bart import BartAttention

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.module_settings import changed_fields
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.recurrence.attention import split_heads
from recurrent_bart.recurrence.cell import SingleLayer, attention_input
from recurrent_bart.recurrence.prefix_recurrence import KeyValue, PrefixReader, PrefixRecurrence, RecurrentState


@dataclass(frozen=True)
class Reads:
    """Measurements, per layer, of the tokens' attention to the state.

    Attributes:
        mass: `(E,)`, share of the attention weights on the state, mean over heads and tokens. With a gate, the share
            only shows how far the gate is open.
        size: `(E, L)`, for each token: norm of the attention output over the state, after the gate, divided by the norm
            of the attention output over tokens.
    """

    mass: Tensor
    size: Tensor


def plain_execution(config: RecurrentBartConfig) -> contextlib.AbstractContextManager[None]:
    """Switch to eager attention, the sequential schedule and gradient across all segments."""
    return changed_fields(config, _attn_implementation="eager", schedule="sequential", bptt_depth=-1)


@torch.no_grad()
def read_segment(
    model: RecurrentBartForConditionalGeneration, ids_11L: Tensor, mask_11L: Tensor, state: RecurrentState
) -> tuple[RecurrentEncoderOutput, Reads]:
    """Encode one segment of one document, and measure attention to the state; call it under `plain_execution`."""
    encoder = model.model.encoder
    with _collect_values(encoder.recurrence) as prefix_values:
        output = model.model.encode(ids_11L, mask_11L, state=state, output_attentions=True, output_hidden_states=True)
    is_token_L = mask_11L[0, 0].bool()
    parts = []
    for layer, weights, hidden, memory_HMK in zip(
        encoder.layers, output.attentions, output.hidden_states[:-1], prefix_values, strict=True
    ):
        attended = attention_input(SingleLayer(layer), hidden[:, 0])
        values_HAK = torch.cat([memory_HMK, _values(layer.self_attn, attended)], dim=1)
        parts.append(_parts(weights[0, 0][:, is_token_L], values_HAK, memory_HMK.shape[1]))
    return output, _joined(parts)


@torch.no_grad()
def read_context(
    model: RecurrentBartForConditionalGeneration, context: RecurrentEncoderOutput, ids_1L: Tensor
) -> Reads | None:
    """Measure the decoder's attention to the states in `context` over a text; return None without states.

    Call this function under `plain_execution`. `ids_1L` starts with the decoder's start id.
    """
    if not context.n_memory:
        return None
    output = model.model.decode(context, input_ids=ids_1L, use_cache=False, output_attentions=True)
    parts = []
    for layer, weights in zip(model.model.decoder.layers, output.cross_attentions, strict=True):
        values_HAK = _values(layer.encoder_attn, context.last_hidden_state)
        parts.append(_parts(weights[0], values_HAK, context.n_memory))
    return _joined(parts)


def _values(attention: BartAttention, hidden_1AD: Tensor) -> Tensor:
    return split_heads(attention, attention.v_proj(hidden_1AD))[0]


def _parts(weights_HLA: Tensor, values_HAK: Tensor, n_memory: int) -> tuple[Tensor, Tensor]:
    """Return `mass` and `size` of `Reads` for one layer; the first `n_memory` positions are state."""
    weights_HLA, values_HAK = weights_HLA.float(), values_HAK.float()
    mass_HL = weights_HLA[..., :n_memory].abs().sum(dim=-1) / weights_HLA.abs().sum(dim=-1)
    memory_HLK = weights_HLA[..., :n_memory] @ values_HAK[:, :n_memory]
    tokens_HLK = weights_HLA[..., n_memory:] @ values_HAK[:, n_memory:]
    return mass_HL.mean(), memory_HLK.norm(dim=(0, 2)) / tokens_HLK.norm(dim=(0, 2))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Reads:
    masses, sizes = zip(*parts, strict=True)
    return Reads(torch.stack(masses), torch.stack(sizes))


@contextlib.contextmanager
def _collect_values(recurrence: PrefixRecurrence) -> Iterator[list[Tensor]]:
    """Collect the prefix values `(H, P, K)` that each layer gets, for one document."""
    values: list[Tensor] = []
    prefix_reader = recurrence.prefix_reader

    def collecting_reader(*args: Any) -> PrefixReader:
        read = prefix_reader(*args)

        def read_and_collect(layer_idx: int, slots_BPD: Tensor) -> KeyValue:
            key, value = read(layer_idx, slots_BPD)
            values.append(value[0])
            return key, value

        return read_and_collect

    # an instance attribute hides the class's method
    vars(recurrence)["prefix_reader"] = collecting_reader
    try:
        yield values
    finally:
        del vars(recurrence)["prefix_reader"]
