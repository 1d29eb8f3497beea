"""Wavefront schedule: compute all cells with an equal sum of segment and layer in one step.

Cell (segment, layer) needs the layer below in the same segment, and the same layer in the segment before. So cells with
an equal sum (a diagonal) are independent, and N segments and E layers take N + E - 1 steps instead of N * E.
"""

# Slots are the P positions in front of a segment's tokens that write the state. A stream tensor holds hidden states.
# Shape suffixes: B documents, N segments, R = layers * documents, S = slots and tokens of a segment, P prefix length
# (= slots), L tokens in a segment, E encoder layers (of a diagonal: its cells' layers), H heads, D model width.

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.fused_cell import can_fuse, fused_cell
from recurrent_bart.execution.stacked_layers import StackedLayers
from recurrent_bart.recurrence.cell import AttentionMasks, attention_input, encoder_cell
from recurrent_bart.recurrence.grouped_linear import slice_weights
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence, Weights
from recurrent_bart.recurrence.segmentation import Segment, on_device

# size of the activations that a cell saves for its backward pass, divided by the size of the cell's hidden states
STREAMS_PER_CELL = 16


@dataclass(frozen=True)
class Diagonal:
    """Cells of one wavefront step; from each layer to the layer above, the segment index falls by one."""

    # lowest layer
    first: int
    # one above the highest layer
    stop: int
    # segment that enters the first layer in this step; None after the last segment
    segment: Segment | None
    # attention masks of the rows (layer, document)
    visible: AttentionMasks
    # (E, B), False where a document has no text in the layer's segment; None if all documents have text
    is_read: Tensor | None


@dataclass(frozen=True)
class Wavefront:
    """Computation of the encoder layers in the order of the wavefront schedule."""

    config: RecurrentBartConfig
    # any layer, for the settings that all layers share
    layer: BartEncoderLayer
    recurrence: PrefixRecurrence
    # returns the first layer's stream (B, P + L, D) from a segment's token embeddings and its slots
    embed: Callable[[Tensor, Tensor | None], Tensor]
    # "layer" recomputes each diagonal in the backward pass; "segment" recomputes groups of diagonals, of the size that
    # minimizes memory; "none" recomputes nothing
    checkpointing: str
    # tokens of every segment are needed, not only the last segment's tokens
    gives_all_tokens: bool = True

    def run(
        self, weights: Weights, segments: Sequence[Segment], mask_BNL: Tensor, state_EBPD: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield, after each segment, the last layer's tokens `(B, L, D)`, if needed, and all states `(E, B, P, D)`.

        A yielded state of a lower layer already belongs to a later segment, except after the last segment.

        Args:
            weights: Stacked weights of all layers.
            segments: Segments of the documents; each function is called when the segment's first diagonal begins.
            mask_BNL: 1 at tokens, on the host.
            state_EBPD: State before the first segment.
        """
        diagonals = self._diagonals(segments, segments[0](), mask_BNL)
        size = _chunk_size(len(diagonals)) if self.checkpointing == "segment" else 1
        frontier = None
        for start in range(0, len(diagonals), size):
            inputs = diagonals[start : start + size], weights, frontier, state_EBPD
            if self.checkpointing != "none" and torch.is_grad_enabled():
                weights, frontier, state_EBPD, outputs = checkpoint(self._chunk, *inputs, use_reentrant=False)
            else:
                weights, frontier, state_EBPD, outputs = self._chunk(*inputs)
            yield from outputs

    def _chunk(
        self, diagonals: list[Diagonal], weights: Weights, frontier_EBSD: Tensor | None, state_EBPD: Tensor
    ) -> tuple[Weights, Tensor | None, Tensor, list[tuple[Tensor | None, Tensor]]]:
        """Run consecutive diagonals; return weights, streams and state for the next chunk, and outputs of `run`."""
        outputs, stacks = [], dict(weights)
        for diagonal in diagonals:
            stream_EBSD = self._entering(diagonal, frontier_EBSD, state_EBPD)
            frontier_EBSD, state_EBPD = self._run_diagonal(diagonal, stacks, stream_EBSD, state_EBPD)
            if diagonal.stop == self.config.encoder_layers:
                frontier_EBSD, top_1BSD = frontier_EBSD.split((len(frontier_EBSD) - 1, 1))
                # a view would keep the streams of all layers alive
                tokens_BLD = top_1BSD[0, :, self.recurrence.n_slots :].clone() if self._gives_tokens(diagonal) else None
                outputs.append((tokens_BLD, state_EBPD))
        return stacks, frontier_EBSD, state_EBPD, outputs

    def _gives_tokens(self, diagonal: Diagonal) -> bool:
        # the last segment's tokens above the last layer are always needed
        return self.gives_all_tokens or diagonal.first == self.config.encoder_layers - 1

    def _entering(self, diagonal: Diagonal, frontier_EBSD: Tensor | None, state_EBPD: Tensor) -> Tensor:
        if diagonal.segment is None:
            assert frontier_EBSD is not None
            return frontier_EBSD
        new_1BSD = self.embed(diagonal.segment(), self.recurrence.slots(state_EBPD)).unsqueeze(0)
        return new_1BSD if frontier_EBSD is None else torch.cat([new_1BSD, frontier_EBSD])

    def _run_diagonal(
        self, diagonal: Diagonal, stacks: dict[str, Tensor], stream_EBSD: Tensor, state_EBPD: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, stop = diagonal.first, diagonal.stop
        inputs = stream_EBSD, state_EBPD[first:stop], diagonal.visible, diagonal.is_read
        stream_EBSD, own = diagonal_step(slice_weights(stacks, first, stop), self.layer, self.recurrence, *inputs)
        if len(own) < len(state_EBPD):
            own = torch.cat([state_EBPD[:first], own, state_EBPD[stop:]])
        return stream_EBSD, own

    def _diagonals(self, segments: Sequence[Segment], tokens_BLD: Tensor, mask_BNL: Tensor) -> list[Diagonal]:
        """Build all diagonals, with views of the masks; `tokens_BLD` gives dtype and device only."""
        n_segments, n_layers, n_documents = len(segments), self.config.encoder_layers, len(mask_BNL)
        # the last segment comes first, so that the segments of a diagonal are contiguous
        mask_NBL = mask_BNL.bool().transpose(0, 1).flip(0)
        is_read_NB = mask_NBL.any(dim=-1)
        # an absent segment needs no mask, see AttentionMasks.build
        has_padding = (~mask_NBL.all(dim=-1) & is_read_NB).any(dim=-1).tolist()
        all_read = is_read_NB.all(dim=-1).tolist()
        is_read_NB = on_device(is_read_NB, tokens_BLD.device)
        visible = AttentionMasks.build(
            self.config, tokens_BLD, mask_NBL.flatten(0, 1), self.recurrence.n_slots, slots_read_prefix=True
        )
        diagonals = []
        for number in range(n_segments + n_layers - 1):
            first, stop = max(0, number - n_segments + 1), min(n_layers, number + 1)
            start, end = (n_segments - 1 - number + layer for layer in (first, stop))
            rows = visible.rows(slice(start * n_documents, end * n_documents), any(has_padding[start:end]))
            new = segments[number] if number < n_segments else None
            is_read = None if all(all_read[start:end]) else is_read_NB[start:end]
            diagonals.append(Diagonal(first, stop, new, rows, is_read))
        return diagonals


def diagonal_step(
    weights: Weights,
    layer: BartEncoderLayer,
    recurrence: PrefixRecurrence,
    stream_EBSD: Tensor,
    state_EBPD: Tensor,
    visible: AttentionMasks,
    is_read_EB: Tensor | None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one cell per layer, for several layers at once.

    Args:
        weights: Stacked weights of these layers.
        layer: Any layer, for the settings that all layers share.
        recurrence: Recurrence of all layers; its parameters are in `weights`.
        stream_EBSD: Hidden states of slots and tokens that enter the layers.
        state_EBPD: States of the layers.
        visible: Attention masks of the rows `(E * B)`.
        is_read_EB: False where a document has no text in the layer's segment; None if all documents have text.
        into: Output buffers of stream and state, without autograd; they may be the input buffers.

    Returns:
        Hidden states of slots and tokens that leave the layers, and the new states.
    """
    layers, gate_RH = StackedLayers(weights, layer), None
    if can_fuse(layer, stream_EBSD):
        return fused_cell(layers, recurrence, stream_EBSD, state_EBPD, visible, is_read_EB, into)
    attended_RSD = attention_input(layers, stream_EBSD.flatten(0, 1))
    key, value = recurrence.project(state_EBPD, weights, layers.key_value)
    prefix = key.flatten(0, 1), value.flatten(0, 1)
    if "prefix_gate" in weights:
        gate_RH = weights["prefix_gate"].repeat_interleave(stream_EBSD.shape[1], dim=0)
    matrix = recurrence.matrix(state_EBPD, attended_RSD.view_as(stream_EBSD), visible.is_token, weights)
    inputs = stream_EBSD.flatten(0, 1), attended_RSD, visible, prefix, gate_RH, matrix
    stream_RSD, _, written = encoder_cell(layers, *inputs)
    stream_EBSD = stream_RSD.view_as(stream_EBSD)
    slots_EBPD = layers.state_of(stream_EBSD[:, :, : visible.n_slots])
    state_EBPD = recurrence.next_state(state_EBPD, slots_EBPD, is_read_EB, weights, written)
    if into is not None:
        stream_EBSD, state_EBPD = into[0].copy_(stream_EBSD), into[1].copy_(state_EBPD)
    return stream_EBSD, state_EBPD


def _chunk_size(n_diagonals: int) -> int:
    """Return the number of diagonals per checkpointed chunk that minimizes the memory of the backward pass."""
    return max(1, round(math.sqrt(n_diagonals / STREAMS_PER_CELL)))
