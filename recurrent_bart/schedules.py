"""In which order the grid of cells (segment, layer) is computed.

Shape suffixes: B documents, N segments, L tokens in a segment, P prefix length (= slots), E encoder layers,
D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.prefix_attention import KeyValue, attend, concat_keys, gated_read, split_heads
from recurrent_bart.prefix_recurrence import PrefixRecurrence, RecurrentState


@dataclass
class GridOutput:
    """What the grid gives.

    Attributes:
        tokens: Of each kept segment, the last layer's token stream `(B, L, D)`.
        memories: Of each kept segment, the last layer's state after it `(B, P, D)`.
        state: The state after the last segment.
    """

    tokens: list[Tensor] = field(default_factory=list)
    memories: list[Tensor] = field(default_factory=list)
    state: RecurrentState | None = None


@dataclass
class SegmentMasks:
    """Attention masks of one segment, in the back-end's form; None: everything is seen."""

    tokens: Tensor | None
    slots: Tensor | None

    @classmethod
    def build(cls, config: RecurrentBartConfig, stream_BLD: Tensor, mask_BL: Tensor) -> "SegmentMasks":
        """Masks of a segment whose stream is `slots, tokens`.

        In a segment that a document does not have, everything is seen: what comes out is thrown away, and a softmax
        over nothing would not be finite.
        """
        n_slots = config.pre_seq_len
        mask_BL = mask_BL.bool() | ~mask_BL.bool().any(dim=1, keepdim=True)
        slots_BP = mask_BL.new_ones(mask_BL.shape[0], n_slots)
        slots_see = torch.cat([slots_BP, slots_BP, mask_BL], dim=1)
        tokens_see = mask_BL if config.prefix_attention == "gated" else torch.cat([slots_BP, mask_BL], dim=1)
        return cls(
            tokens=create_bidirectional_mask(config, stream_BLD[:, n_slots:], tokens_see),
            slots=create_bidirectional_mask(config, stream_BLD[:, :n_slots], slots_see) if n_slots else None,
        )


def sequential(
    config: RecurrentBartConfig,
    layers: nn.ModuleList,
    recurrence: PrefixRecurrence | None,
    embed: Callable[[int], Tensor],
    mask_BNL: Tensor,
    state: RecurrentState | None,
    keep_every_segment: bool,
) -> GridOutput:
    """Segment after segment, layer after layer: the reference.

    Gradient crosses `config.bptt_depth` segment boundaries: the segments form windows of one more than that, aligned to
    the last one, and the state is cut between windows. Segments whose output reaches no kept one by gradient run
    without a graph.

    Args:
        config: The architecture.
        layers: The encoder's layers.
        recurrence: Their recurrence; None where `pre_seq_len` is 0.
        embed: Gives the first layer's stream `(B, P + L, D)`, slots in front, of a segment by its number.
        mask_BNL: 1 at tokens; a segment without any leaves its document's state unchanged.
        state: What was read before; None at the head of the documents.
        keep_every_segment: Keep every segment's output, not the last one's alone.
    """
    n_documents, n_segments, _ = mask_BNL.shape
    is_read_BN = mask_BNL.bool().any(dim=-1)
    window = n_segments if config.bptt_depth == -1 else config.bptt_depth + 1
    first_with_graph = 0 if keep_every_segment else n_segments - window
    # without a state nothing is left of a segment but its own output
    first = 0 if recurrence or keep_every_segment else n_segments - 1
    start = memory = recurrence.start(state, n_documents) if recurrence else None
    output = GridOutput()
    for t in range(first, n_segments):
        if recurrence and t > 0 and (n_segments - t) % window == 0:
            memory = recurrence.cut(memory, start, is_read_BN[:, :t].any(dim=1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and t >= first_with_graph):
            tokens, memory = _read_segment(
                config, layers, recurrence, embed(t), mask_BNL[:, t], is_read_BN[:, t], memory
            )
        if keep_every_segment or t == n_segments - 1:
            output.tokens.append(tokens)
            if recurrence:
                output.memories.append(memory[-1])
    if recurrence:
        position_B = is_read_BN.sum(dim=1)
        output.state = RecurrentState(memory.transpose(0, 1), position_B + (state.position if state else 0))
    return output


def _read_segment(
    config: RecurrentBartConfig,
    layers: nn.ModuleList,
    recurrence: PrefixRecurrence | None,
    stream_BLD: Tensor,
    mask_BL: Tensor,
    is_read_B: Tensor,
    memory_EBPD: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One segment through all layers; returns its token stream and the state after it."""
    n_slots = config.pre_seq_len
    masks = SegmentMasks.build(config, stream_BLD, mask_BL)
    if recurrence is None:
        for layer in layers:
            stream_BLD = run_cell(layer, stream_BLD, masks, None, None)
        return stream_BLD, None
    slots = []
    prefixes = recurrence.project(memory_EBPD, layers)
    gates = recurrence.prefix_gate if config.prefix_attention == "gated" else [None] * len(layers)
    for layer, prefix, gate in zip(layers, prefixes, gates, strict=True):
        stream_BLD = run_cell(layer, stream_BLD, masks, prefix, gate)
        slots.append(stream_BLD[:, :n_slots])
    return stream_BLD[:, n_slots:], recurrence.update(memory_EBPD, torch.stack(slots), is_read_B)


def run_cell(
    layer: BartEncoderLayer, stream_BLD: Tensor, masks: SegmentMasks, prefix: KeyValue | None, gate_H: Tensor | None
) -> Tensor:
    """One cell; recomputed in the backward pass where gradient checkpointing is on for this layer."""
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(encoder_cell, layer, stream_BLD, masks, prefix, gate_H)
    return encoder_cell(layer, stream_BLD, masks, prefix, gate_H)


def encoder_cell(
    layer: BartEncoderLayer, stream_BLD: Tensor, masks: SegmentMasks, prefix: KeyValue | None, gate_H: Tensor | None
) -> Tensor:
    """One layer over one segment. Identical to BartEncoderLayer except: its attention.

    Args:
        layer: The layer.
        stream_BLD: `(B, P + L, D)`, slots in front of tokens.
        masks: The segment's masks.
        prefix: Keys and values `(B, H, P, K)` of the layer's state; None switches the recurrence off.
        gate_H: Gate of each head on the prefix, which then has a softmax of its own; None: one softmax over all.
    """
    read = cell_attention(layer, stream_BLD, masks, prefix, gate_H)
    dropped = nn.functional.dropout(layer.self_attn.out_proj(read), p=layer.dropout, training=layer.training)
    stream_BLD = layer.self_attn_layer_norm(stream_BLD + dropped)
    hidden = layer.activation_fn(layer.fc1(stream_BLD))
    hidden = nn.functional.dropout(hidden, p=layer.activation_dropout, training=layer.training)
    hidden = nn.functional.dropout(layer.fc2(hidden), p=layer.dropout, training=layer.training)
    return layer.final_layer_norm(stream_BLD + hidden)


def cell_attention(
    layer: BartEncoderLayer, stream_BLD: Tensor, masks: SegmentMasks, prefix: KeyValue | None, gate_H: Tensor | None
) -> Tensor:
    """What slots and tokens read, `(B, P + L, D)`: tokens never see slots, slots see everything."""
    attention = layer.self_attn
    query = split_heads(attention, attention.q_proj(stream_BLD))
    key = split_heads(attention, attention.k_proj(stream_BLD))
    value = split_heads(attention, attention.v_proj(stream_BLD))
    if prefix is None:
        return attend(attention, query, (key, value), masks.tokens)[0].flatten(2)
    n_slots = prefix[0].shape[2]
    slot_query, token_query = query[:, :, :n_slots], query[:, :, n_slots:]
    tokens = key[:, :, n_slots:], value[:, :, n_slots:]
    slot_read, _ = attend(attention, slot_query, concat_keys(prefix, (key, value)), masks.slots)
    if gate_H is None:
        token_read, _ = attend(attention, token_query, concat_keys(prefix, tokens), masks.tokens)
    else:
        token_read, _ = attend(attention, token_query, tokens, masks.tokens)
        token_read = gated_read(token_read, attend(attention, token_query, prefix, None)[0], gate_H)
    return torch.cat([slot_read, token_read], dim=1).flatten(2)
