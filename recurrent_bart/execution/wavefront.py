"""Cells of the grid by diagonals: those whose segment and layer add up to the same are computed at once.

Cell (segment, layer) needs the layer below in its segment and its own layer in the segment before, so the cells of a
diagonal need nothing of each other: N + E - 1 steps instead of N * E.

Shape suffixes: B documents, N segments, R = layers * documents, S = slots and tokens of a segment, P prefix length
(= slots), L tokens in a segment, E encoder layers (of a diagonal: those it has a cell of), H heads, D model width.
"""

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
from recurrent_bart.recurrence.cell import AttentionMasks, encoder_cell
from recurrent_bart.recurrence.grouped_linear import slice_weights
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence, Weights
from recurrent_bart.recurrence.segmentation import Segment, on_device

# what a cell keeps for its backward pass, in streams of its segment
STREAMS_PER_CELL = 16


@dataclass(frozen=True)
class Diagonal:
    """The cells of a diagonal: layers counted up are at segments counted down.

    Attributes:
        first: Lowest layer that it has a cell of.
        stop: One above the highest.
        segment: The one that begins here; None behind the last one.
        visible: What the rows (layer, document) see.
        is_read: False where the document has no text in the segment that the layer is at, `(E, B)`; None: nowhere.
    """

    first: int
    stop: int
    segment: Segment | None
    visible: AttentionMasks
    is_read: Tensor | None


@dataclass(frozen=True)
class Wavefront:
    """An encoder whose segments are computed by diagonals.

    Attributes:
        config: The architecture.
        layer: A layer, for what all have in common.
        recurrence: Their recurrence; None where `pre_seq_len` is 0.
        embed: Gives the first layer's stream `(B, P + L, D)` from a segment's token embeddings and its slots.
        checkpointing: What is recomputed in the backward pass, so that of the diagonals before it only streams and
            states are kept: `"layer"`: each diagonal for itself; `"segment"`: as many together as makes the whole
            smallest; `"none"`.
        gives_all_tokens: Whether tokens are wanted of every segment, not of the last one alone.
    """

    config: RecurrentBartConfig
    layer: BartEncoderLayer
    recurrence: PrefixRecurrence | None
    embed: Callable[[Tensor, Tensor | None], Tensor]
    checkpointing: str
    gives_all_tokens: bool = True

    @property
    def n_slots(self) -> int:
        """Slots in front of each segment's tokens."""
        return self.recurrence.n_slots if self.recurrence else 0

    def run(
        self, weights: Weights, segments: Sequence[Segment], mask_BNL: Tensor, memory_EBPD: Tensor | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """After each segment, the last layer's tokens `(B, L, D)`, if wanted, and the states `(E, B, P, D)`.

        Lower layers' states are of later segments already; behind the last segment all are of that.

        Args:
            weights: Of all layers, stacked.
            segments: The documents', each read when its first diagonal begins.
            mask_BNL: 1 at tokens, on the host.
            memory_EBPD: The states before the first segment.
        """
        diagonals = self._diagonals(segments, segments[0](), mask_BNL)
        size = _chunk_size(len(diagonals)) if self.checkpointing == "segment" else 1
        frontier = None
        for start in range(0, len(diagonals), size):
            inputs = diagonals[start : start + size], weights, frontier, memory_EBPD
            if self.checkpointing != "none" and torch.is_grad_enabled():
                weights, frontier, memory_EBPD, outputs = checkpoint(self._chunk, *inputs, use_reentrant=False)
            else:
                weights, frontier, memory_EBPD, outputs = self._chunk(*inputs)
            yield from outputs

    def _chunk(
        self, diagonals: list[Diagonal], weights: Weights, frontier_EBSD: Tensor | None, memory_EBPD: Tensor | None
    ) -> tuple[Weights, Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Diagonals one after the other: stacks and streams for the next one, states, and what `run` gives."""
        outputs, stacks = [], dict(weights)
        for diagonal in diagonals:
            stream_EBSD = self._entering(diagonal, frontier_EBSD, memory_EBPD)
            frontier_EBSD, memory_EBPD = self._run_diagonal(diagonal, stacks, stream_EBSD, memory_EBPD)
            if diagonal.stop == self.config.encoder_layers:
                frontier_EBSD, top_1BSD = frontier_EBSD.split((len(frontier_EBSD) - 1, 1))
                # not a view, which would keep the streams of all layers
                tokens_BLD = top_1BSD[0, :, self.n_slots :].clone() if self._gives_tokens(diagonal) else None
                outputs.append((tokens_BLD, memory_EBPD))
        return stacks, frontier_EBSD, memory_EBPD, outputs

    def _gives_tokens(self, diagonal: Diagonal) -> bool:
        """Whether tokens that leave the last layer are wanted; those of the last segment do so in the last diagonal."""
        return self.gives_all_tokens or diagonal.first == self.config.encoder_layers - 1

    def _entering(self, diagonal: Diagonal, frontier_EBSD: Tensor | None, memory_EBPD: Tensor | None) -> Tensor:
        """The stream below each layer of a diagonal: a new segment's below the first, if there is one."""
        if diagonal.segment is None:
            assert frontier_EBSD is not None
            return frontier_EBSD
        slots = None if self.recurrence is None or memory_EBPD is None else self.recurrence.slots(memory_EBPD)
        new_1BSD = self.embed(diagonal.segment(), slots).unsqueeze(0)
        return new_1BSD if frontier_EBSD is None else torch.cat([new_1BSD, frontier_EBSD])

    def _run_diagonal(
        self, diagonal: Diagonal, stacks: dict[str, Tensor], stream_EBSD: Tensor, memory_EBPD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        first, stop = diagonal.first, diagonal.stop
        own = None if memory_EBPD is None else memory_EBPD[first:stop]
        inputs = stream_EBSD, own, diagonal.visible, diagonal.is_read
        stream_EBSD, own = diagonal_step(slice_weights(stacks, first, stop), self.layer, self.recurrence, *inputs)
        if memory_EBPD is not None and own is not None and len(own) < len(memory_EBPD):
            own = torch.cat([memory_EBPD[:first], own, memory_EBPD[stop:]])
        return stream_EBSD, own

    def _diagonals(self, segments: Sequence[Segment], tokens_BLD: Tensor, mask_BNL: Tensor) -> list[Diagonal]:
        """All diagonals, with views of what each needs; any segment's tokens say of which type and where."""
        n_segments, n_layers, n_documents = len(segments), self.config.encoder_layers, len(mask_BNL)
        # the last segment first, so that the segments of a diagonal are one block
        mask_NBL = mask_BNL.bool().transpose(0, 1).flip(0)
        is_read_NB = mask_NBL.any(dim=-1)
        # a segment that a document does not have is seen whole, see AttentionMasks
        has_padding = (~mask_NBL.all(dim=-1) & is_read_NB).any(dim=-1).tolist()
        all_read = is_read_NB.all(dim=-1).tolist()
        is_read_NB = on_device(is_read_NB, tokens_BLD.device)
        visible = AttentionMasks.build(
            self.config, tokens_BLD, mask_NBL.flatten(0, 1), self.n_slots, slots_read_prefix=True
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
    recurrence: PrefixRecurrence | None,
    stream_EBSD: Tensor,
    memory_EBPD: Tensor | None,
    visible: AttentionMasks,
    is_read_EB: Tensor | None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One cell of each of several layers.

    Args:
        weights: Of these layers.
        layer: Any layer, for what all have in common.
        recurrence: Likewise; its parameters are in `weights`.
        stream_EBSD: Slots and tokens that enter the layers.
        memory_EBPD: Their states.
        visible: What the rows `(E * B)` see.
        is_read_EB: False where the document has no text in the segment that the layer is at; None: nowhere.
        into: Where to leave both, without a graph; may be where they came from.

    Returns:
        Slots and tokens that leave the layers, and their new states.
    """
    layers, prefix, gate_RH, matrix = StackedLayers(weights, layer), None, None, None
    if recurrence is not None and memory_EBPD is not None:
        if visible.n_slots and can_fuse(layer, stream_EBSD):
            return fused_cell(layers, recurrence, stream_EBSD, memory_EBPD, visible, is_read_EB, into)
        key, value = recurrence.project(memory_EBPD, weights, layers.key_value)
        prefix = key.flatten(0, 1), value.flatten(0, 1)
        if "prefix_gate" in weights:
            gate_RH = weights["prefix_gate"].repeat_interleave(stream_EBSD.shape[1], dim=0)
        matrix = recurrence.matrix(memory_EBPD, stream_EBSD, visible.is_token, weights)
    stream_RSD, _, written = encoder_cell(layers, stream_EBSD.flatten(0, 1), visible, prefix, gate_RH, matrix)
    stream_EBSD = stream_RSD.view_as(stream_EBSD)
    if recurrence is not None and memory_EBPD is not None:
        slots_EBPD = stream_EBSD[:, :, : visible.n_slots]
        memory_EBPD = recurrence.next_memory(memory_EBPD, slots_EBPD, is_read_EB, weights, written)
    if into is not None:
        assert memory_EBPD is not None
        stream_EBSD, memory_EBPD = into[0].copy_(stream_EBSD), into[1].copy_(memory_EBPD)
    return stream_EBSD, memory_EBPD


def _chunk_size(n_diagonals: int) -> int:
    """Diagonals to recompute together: streams between chunks and what a chunk keeps cost as much as each other."""
    return max(1, round(math.sqrt(n_diagonals / STREAMS_PER_CELL)))
