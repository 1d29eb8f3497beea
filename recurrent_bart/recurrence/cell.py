"""One cell of the grid: one encoder layer applied to one segment's slots and tokens."""

# Slots are the P positions in front of a segment's tokens that write the next state. A stream holds hidden states.
# Shape suffixes: B documents, L tokens in a segment, P prefix length (= slots), H heads, K head width,
# A attended length, D model width.

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.associative_memory import Matrix
from recurrent_bart.recurrence.attention import attend, concat_keys, gated_read, split_heads
from recurrent_bart.recurrence.prefix_recurrence import KeyValue
from recurrent_bart.recurrence.segmentation import to_device


@dataclass(frozen=True)
class AttentionMasks:
    """Attention masks of a segment in the form that the attention back-end needs; None hides no key."""

    # mask of the tokens' keys; with one softmax over prefix and tokens, the prefix comes first
    tokens: Tensor | None
    # mask of the slots' keys: prefix, slots and tokens, or slots and tokens
    slots: Tensor | None
    # number of slots in front of the tokens
    n_slots: int
    slots_read_prefix: bool
    # (B, L), False at padding, where an associative memory is not written
    is_token: Tensor | None = None

    @classmethod
    def build(
        cls, config: RecurrentBartConfig, stream_BLD: Tensor, mask_BL: Tensor, n_slots: int, slots_read_prefix: bool
    ) -> "AttentionMasks":
        """Build the masks of segments from a host mask `(B, L)` that is 1 at tokens.

        All queries of a document see the same keys, so a mask has one query per document. Without padding no mask is
        built. If a document has no tokens in the segment, every key is visible, because a softmax over no key is not
        finite; its output is discarded. `stream_BLD` gives only the dtype and the device.
        """
        mask_BL = mask_BL.bool() | ~mask_BL.bool().any(dim=1, keepdim=True)
        if mask_BL.all():
            return cls(None, None, n_slots, slots_read_prefix)
        prefix_BP = mask_BL.new_ones(len(mask_BL), config.pre_seq_len)
        slots_BP = prefix_BP[:, :n_slots]
        slots_see = torch.cat([prefix_BP, slots_BP, mask_BL] if slots_read_prefix else [slots_BP, mask_BL], dim=1)
        tokens_see = mask_BL if config.prefix_attention == "gated" else torch.cat([prefix_BP, mask_BL], dim=1)
        query = stream_BLD.new_empty(len(mask_BL), 1, 1, device=mask_BL.device)
        masks = [create_bidirectional_mask(config, query, seen) for seen in (tokens_see, slots_see)]
        tokens, slots = (to_device(mask, stream_BLD.device) for mask in masks)
        is_token = to_device(mask_BL, stream_BLD.device) if config.associative_memory else None
        return cls(tokens, slots if n_slots else None, n_slots, slots_read_prefix, is_token)

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "AttentionMasks":
        """Move the masks as `Tensor.to` does; accelerate calls this method if layers are on several devices."""
        tokens, slots, is_token = (
            mask if mask is None else mask.to(device, non_blocking=non_blocking)
            for mask in (self.tokens, self.slots, self.is_token)
        )
        return dataclasses.replace(self, tokens=tokens, slots=slots, is_token=is_token)

    def rows(self, rows: slice, has_padding: bool) -> "AttentionMasks":
        """Return the masks of some rows. Without padding they are None, because attention is then faster."""
        masks = self.tokens, self.slots, self.is_token
        tokens, slots, is_token = (None if mask is None or not has_padding else mask[rows] for mask in masks)
        return dataclasses.replace(self, tokens=tokens, slots=slots, is_token=is_token)


class CellLayer(Protocol):
    """Operations that a cell needs from one encoder layer or from several stacked layers."""

    # layer whose activation, dropout and attention implementation apply to all layers
    shared: BartEncoderLayer

    def query_key_value(self, stream_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, each `(B, H, L, K)`."""

    def out_proj(self, read_BLD: Tensor) -> Tensor:
        """Apply the output projection of attention."""

    def self_attn_layer_norm(self, stream_BLD: Tensor) -> Tensor:
        """Apply the layer norm after attention, with `normalize_before` the one before attention."""

    def fc1(self, stream_BLD: Tensor) -> Tensor:
        """Apply the first feed-forward map."""

    def fc2(self, hidden: Tensor) -> Tensor:
        """Apply the second feed-forward map."""

    def final_layer_norm(self, stream_BLD: Tensor) -> Tensor:
        """Apply the layer norm after the feed-forward block, with `normalize_before` the one before the block."""


class SingleLayer:
    """One encoder layer as a `CellLayer`; each operation calls the layer's own module."""

    def __init__(self, layer: BartEncoderLayer):
        self.shared = layer
        self.out_proj, self.fc1, self.fc2 = layer.self_attn.out_proj, layer.fc1, layer.fc2
        self.self_attn_layer_norm, self.final_layer_norm = layer.self_attn_layer_norm, layer.final_layer_norm

    def query_key_value(self, stream_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values, each `(B, H, L, K)`."""
        own = self.shared.self_attn
        query, key, value = (split_heads(own, part(stream_BLD)) for part in (own.q_proj, own.k_proj, own.v_proj))
        return query, key, value


def attention_input(layer: CellLayer, stream_BLD: Tensor) -> Tensor:
    """Return the hidden states that a layer's attention reads: normed with `normalize_before`, otherwise unchanged."""
    return layer.self_attn_layer_norm(stream_BLD) if normalizes_before(layer.shared) else stream_BLD


def normalizes_before(layer: BartEncoderLayer) -> bool:
    """Return True if the layer's norms come before attention and feed-forward block, as in MBart."""
    return layer.self_attn.config.normalize_before


def encoder_cell(
    layer: CellLayer,
    stream_BLD: Tensor,
    attended_BLD: Tensor,
    visible: AttentionMasks,
    prefix: KeyValue | None,
    gate_BH: Tensor | None,
    matrix: Matrix | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run one layer on one segment. Only the attention differs from BartEncoderLayer or MBartEncoderLayer.

    Args:
        layer: The layer, or several stacked layers; B then counts the documents of each layer.
        stream_BLD: Hidden states `(B, P + L, D)`, slots in front of tokens.
        attended_BLD: Result of `attention_input` for these hidden states.
        visible: Attention masks of slots and tokens.
        prefix: Keys and values `(B, H, P, K)` of the layer's state; None disables the recurrence.
        gate_BH: Gate of each head on a separate softmax over the prefix; None means one softmax over all keys.
        matrix: The layer's associative memory, if it has one.

    Returns:
        The layer's output hidden states; the tokens' attention weights `(B, H, L, A)`, from the eager back-end only;
        the matrix values after the segment.
    """
    shared, dropout, is_before = layer.shared, nn.functional.dropout, normalizes_before(layer.shared)
    read, weights, written = cell_attention(layer, attended_BLD, visible, prefix, gate_BH, matrix)
    stream_BLD = stream_BLD + dropout(layer.out_proj(read), p=shared.dropout, training=shared.training)
    if not is_before:
        stream_BLD = layer.self_attn_layer_norm(stream_BLD)
    hidden = layer.fc1(layer.final_layer_norm(stream_BLD) if is_before else stream_BLD)
    hidden = dropout(shared.activation_fn(hidden), p=shared.activation_dropout, training=shared.training)
    hidden = dropout(layer.fc2(hidden), p=shared.dropout, training=shared.training)
    stream_BLD = stream_BLD + hidden
    return within_range(stream_BLD) if is_before else layer.final_layer_norm(stream_BLD), weights, written


def within_range(stream: Tensor) -> Tensor:
    """Return hidden states clamped to `largest_stream`, as MBartEncoderLayer does; no norm bounds them."""
    most = largest_stream(stream.dtype)
    return stream if most is None else stream.clamp(min=-most, max=most)


def largest_stream(dtype: torch.dtype) -> float | None:
    """Return the largest number that MBart's layers give as a hidden state, near float16's largest; None: no limit."""
    return torch.finfo(dtype).max - 1000 if dtype == torch.float16 else None


def cell_attention(
    layer: CellLayer,
    attended_BLD: Tensor,
    visible: AttentionMasks,
    prefix: KeyValue | None,
    gate_BH: Tensor | None,
    matrix: Matrix | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return attention output, the tokens' attention weights and the new matrix. Tokens never attend to slots."""
    attention, n_slots = layer.shared.self_attn, visible.n_slots
    token_query, *tokens = query_key_value = layer.query_key_value(attended_BLD)
    if n_slots:
        # split instead of slices: the backward pass of each slice would write the whole tensor
        parts = [part.split((n_slots, part.shape[2] - n_slots), dim=2) for part in query_key_value]
        (slots_query, *slots), (token_query, *tokens) = zip(*parts, strict=True)
    tokens_see = concat_keys(prefix, tokens) if prefix is not None and gate_BH is None else tokens
    read, weights = attend(attention, token_query, tokens_see, visible.tokens)
    if gate_BH is not None:
        prefix_read = attend(attention, token_query, prefix, None)
        read, weights = gated_read((read, weights), prefix_read, gate_BH)
    written = None
    if matrix is not None:
        read, written = read + matrix.read(token_query), matrix.written(*tokens)
    if n_slots:
        slots_see = concat_keys(prefix, slots, tokens) if visible.slots_read_prefix else concat_keys(slots, tokens)
        slots_read, _ = attend(attention, slots_query, slots_see, visible.slots)
        read = torch.cat([slots_read, read], dim=1)
    return read.flatten(2), weights, written
