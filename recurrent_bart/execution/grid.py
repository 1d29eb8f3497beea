"""Grid of cells, one cell per segment and layer, and the order in which cells are computed."""

# Slots are the P positions in front of a segment's tokens that write the state. A stream tensor holds hidden states.
# Shape suffixes: B documents, N segments, L tokens in a segment, P prefix length (= slots), E encoder layers, H heads,
# A attended length, D model width.

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.graphed_wavefront import GraphedWavefront, can_graph
from recurrent_bart.execution.stacked_layers import stack_layers, why_not_stacked
from recurrent_bart.execution.wavefront import Wavefront
from recurrent_bart.recurrence.bptt import cuts_state, n_segments_with_graph, state_windows
from recurrent_bart.recurrence.cell import AttentionMasks
from recurrent_bart.recurrence.prefix_recurrence import PrefixRecurrence, RecurrentState, Weights
from recurrent_bart.recurrence.segmentation import Segment, on_device, to_device

# `schedule="auto"` uses the wavefront up to this number of tokens of one segment over all documents. At 8,192, the
# wavefront was 1.5 to 1.9 times as fast on an H100 (benchmarks/LOG.md). Larger sizes are not measured; they need more
# memory, because the wavefront holds hidden states of all layers. Without a state, see `Grid._n_together`
MOST_TOKENS = 16_384
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class OutputSelection:
    """Selection of the grid's outputs; the last segment's tokens and state are always returned."""

    # tokens and states of every segment, each with its autograd graph
    every_segment: bool = False
    # token streams of all segments, with or without an autograd graph
    tokens: bool = False
    # states after all segments, with or without an autograd graph
    states: bool = False
    # token streams of every layer
    hidden_states: bool = False
    # attention weights of every layer
    attentions: bool = False

    def all_segments(self) -> bool:
        """Return True if some output needs all segments, even if no state is carried between segments."""
        return self.every_segment or self.tokens or self.states or self.hidden_states or self.attentions


@dataclass
class SegmentOutput:
    """Outputs of one segment: tokens `(B, L, D)`, state `(E, B, P, D)`, each layer's hidden states and attention."""

    tokens: Tensor | None
    memory: Tensor | None
    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)

    def split(self, n_segments: int) -> list["SegmentOutput"]:
        """Split the outputs of `n_segments` segments that ran as one batch and carry no state."""
        assert self.tokens is not None
        n_rows = len(self.tokens) // n_segments
        hidden_states, attentions = (
            list(zip(*(part.split(n_rows) for part in parts), strict=True)) or [()] * n_segments
            for parts in (self.hidden_states, self.attentions)
        )
        parts = zip(self.tokens.split(n_rows), hidden_states, attentions, strict=True)
        return [SegmentOutput(tokens, None, list(hidden), list(weights)) for tokens, hidden, weights in parts]


# function from segments, their mask, the state before them and the selected outputs to the outputs of each segment
Schedule = Callable[[list[Segment], Tensor, Tensor | None, OutputSelection], Iterator[SegmentOutput]]


@dataclass
class GridOutput:
    """Outputs of the selected segments, one list entry per segment."""

    # token streams (B, L, D) of the last layer
    tokens: list[Tensor] = field(default_factory=list)
    # states (B, P, D) of the last layer after the segment
    states: list[Tensor] = field(default_factory=list)
    # token streams (B, L, D) below and above every layer
    hidden_states: list[list[Tensor]] = field(default_factory=list)
    # attention weights (B, H, L, A) of every layer
    attentions: list[list[Tensor]] = field(default_factory=list)
    # state (E, B, P, D) after the last segment
    memory: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """Modules and settings that compute the cells of a batch."""

    config: RecurrentBartConfig
    layers: nn.ModuleList
    # None if `pre_seq_len` is 0
    recurrence: PrefixRecurrence | None
    # returns the first layer's stream (B, P + L, D) from a segment's token embeddings and its slots
    embed: Callable[[Tensor, Tensor | None], Tensor]
    # the backward pass recomputes each segment as a whole
    checkpoints_segments: bool = False
    # norm after the last layer, which `normalize_before` needs
    final_norm: nn.Module | None = None

    def run(
        self,
        segments_BNLD: Tensor,
        mask_BNL: Tensor,
        state: RecurrentState | None,
        selection: OutputSelection,
        earlier: Sequence[Segment] = (),
    ) -> GridOutput:
        """Run the grid in the order that `config.schedule` names.

        The state's gradient crosses at most `config.bptt_depth` segment boundaries: the state is detached between the
        windows of `bptt.state_windows`, for documents that `bptt.cuts_state` names. Segments run without an autograd
        graph if no selected output needs their gradient.

        Args:
            segments_BNLD: Token embeddings of the last segments. Each document ends in the last
                segment.
            mask_BNL: Mask in CPU memory, 1 at tokens and 0 at padding. A segment without tokens leaves its
                document's state unchanged.
            state: State after earlier calls; None at the start of the documents.
            selection: Outputs that the caller needs.
            earlier: Segments before `segments_BNLD`; they get no gradient.
        """
        n_segments = mask_BNL.shape[1]
        is_read_BN = mask_BNL.bool().any(dim=-1)
        memory = learned = self.recurrence.initial_state(len(mask_BNL)) if self.recurrence else None
        is_begun_B = torch.zeros(len(mask_BNL), dtype=torch.bool, device=segments_BNLD.device)
        if state is not None and state.memory is not None:
            is_begun_B = state.position > 0
            memory = _chosen(is_begun_B, state.memory.transpose(0, 1).to(learned.dtype), learned)
        initial = memory
        # unbind, because the backward pass of each index would write a gradient of all segments
        segments = [*earlier, *(_constant_segment(tokens_BLD) for tokens_BLD in segments_BNLD.unbind(dim=1))]
        windows = self._windows(is_read_BN, selection)
        run: Schedule = self._sequential
        if any(part.stop - part.start > 1 for part, _ in windows):
            run = self._fastest(segments_BNLD, selection)
        output = GridOutput()
        for part, has_graph in windows:
            with torch.set_grad_enabled(torch.is_grad_enabled() and has_graph):
                if self.config.has_state and state_windows(self.config, n_segments).detaches_before(part.start):
                    memory = _chosen(cuts_state(is_read_BN, part.start, is_begun_B), memory.detach(), initial)
                for t, segment in enumerate(
                    run(segments[part], mask_BNL[:, part], memory, selection), start=part.start
                ):
                    # a static prefix stays the parameter: the output of a window without a graph has no gradient
                    memory = segment.memory if self.config.has_state else learned
                    self._append(output, segment, selection, is_last=t == n_segments - 1)
        output.memory = memory if self.config.has_state else None
        return output

    def _windows(self, is_read_BN: Tensor, selection: OutputSelection) -> list[tuple[slice, bool]]:
        """Return the segments that run together as slices, each with True if they have an autograd graph."""
        n_segments = is_read_BN.shape[1]
        # without a carried state, only the outputs of earlier segments could matter
        first = 0 if self.config.has_state or selection.all_segments() else n_segments - 1
        if not torch.is_grad_enabled():
            return [(slice(first, n_segments), False)]
        first_with_graph = n_segments - n_segments_with_graph(self.config, is_read_BN, selection.every_segment)
        starts = state_windows(self.config, n_segments).starts() if self.config.has_state else []
        cuts = {first_with_graph, *starts} & set(range(max(first + 1, first_with_graph), n_segments))
        borders = [first, *sorted(cuts), n_segments]
        return [(slice(start, stop), start >= first_with_graph) for start, stop in itertools.pairwise(borders)]

    def _fastest(self, segments_BNLD: Tensor, selection: OutputSelection) -> Schedule:
        schedule = self.config.schedule
        if schedule == "sequential":
            return self._sequential
        if not self.config.has_state:
            # the segments of a document already saturate a CPU one by one
            is_faster = schedule == "wavefront" or segments_BNLD.device.type != "cpu"
            return self._parallel if is_faster else self._sequential
        if schedule == "auto" and not is_wavefront_faster(segments_BNLD):
            return self._sequential
        # only the sequential schedule returns hidden states and attention weights of every layer
        if selection.hidden_states or selection.attentions or self.config.recurrence == "top":
            return self._sequential
        if self._has_different_layers() or self._is_on_other_device(segments_BNLD.device):
            return self._sequential
        assert self.recurrence is not None
        weights = stack_layers(self.layers, self.final_norm) | dict(self.recurrence.by_layer())
        return functools.partial(self._wavefront, weights)

    def _has_different_layers(self) -> bool:
        # only the sequential schedule supports layers that differ in more than their parameters
        obstacle = why_not_stacked(self.layers, self.final_norm)
        if obstacle and self.config.schedule == "wavefront":
            logger.warning_once(f"schedule='wavefront': segments are computed one after the other, because {obstacle}")
        return bool(obstacle)

    def _is_on_other_device(self, device: torch.device) -> bool:
        # parameters of offloaded layers come to the device only when the layer's module is called
        is_on_other_device = any(parameter.device != device for parameter in self.layers.parameters())
        if is_on_other_device and self.config.schedule == "wavefront":
            logger.warning_once("schedule='wavefront': layers run one by one, because some are on a different device")
        return is_on_other_device

    def _append(self, output: GridOutput, segment: SegmentOutput, selection: OutputSelection, is_last: bool) -> None:
        if self.final_norm is not None and (
            selection.every_segment or selection.tokens or selection.hidden_states or is_last
        ):
            segment.tokens = self.final_norm(segment.tokens).to(segment.tokens.device)
            # as in Hugging Face's models, the last hidden states are the output
            segment.hidden_states[-1:] = [segment.tokens] * selection.hidden_states
        if selection.every_segment or selection.tokens or is_last:
            output.tokens.append(segment.tokens)
        if self.config.has_state and (selection.every_segment or selection.states or is_last):
            # a view would keep the states of all layers alive
            output.states.append(self.recurrence.without_matrix(segment.memory)[-1].clone())
        if selection.hidden_states:
            output.hidden_states.append(segment.hidden_states)
        if selection.attentions:
            output.attentions.append(segment.attentions)

    def _wavefront(
        self,
        weights: Weights,
        segments: list[Segment],
        mask_BNL: Tensor,
        state_EBPD: Tensor | None,
        selection: OutputSelection,
    ) -> Iterator[SegmentOutput]:
        """Run the wavefront schedule; a single segment has one cell per diagonal, so it runs sequentially."""
        if len(segments) == 1:
            yield from self._sequential(segments, mask_BNL, state_EBPD, selection)
            return
        assert self.recurrence is not None
        assert state_EBPD is not None
        layer = self.layers[0]
        by_layer = "layer" if layer.gradient_checkpointing and layer.training else "none"
        checkpointing = "segment" if self.checkpoints_segments else by_layer
        kind = (
            GraphedWavefront
            if self.config.schedule == "auto" and can_graph(layer, weights, segments[0](), checkpointing)
            else Wavefront
        )
        gives_all_tokens = selection.every_segment or selection.tokens
        wavefront = kind(self.config, layer, self.recurrence, self.embed, checkpointing, gives_all_tokens)
        for top, memory in wavefront.run(weights, segments, mask_BNL, state_EBPD):
            yield SegmentOutput(top, memory)

    def _sequential(
        self, segments: list[Segment], mask_BNL: Tensor, state_EBPD: Tensor | None, selection: OutputSelection
    ) -> Iterator[SegmentOutput]:
        """Run one segment after the other, layer by layer; other schedules must give the same results."""
        for read, mask_BL in zip(segments, mask_BNL.unbind(dim=1), strict=True):
            segment = self._checkpointed(read(), mask_BL, state_EBPD, selection)
            state_EBPD = segment.memory
            yield segment

    def _checkpointed(self, *inputs: Any) -> SegmentOutput:
        if self.checkpoints_segments and torch.is_grad_enabled():
            return checkpoint(self._segment, *inputs, use_reentrant=False)
        return self._segment(*inputs)

    def _parallel(
        self, segments: list[Segment], mask_BNL: Tensor, state_EBPD: Tensor | None, selection: OutputSelection
    ) -> Iterator[SegmentOutput]:
        """Run segments that no state connects as one batch, or as several batches where that needs less memory."""
        n_together = self._n_together(mask_BNL, needs_gradient=segments[-1]().requires_grad)
        for start in range(0, len(segments), n_together):
            part = segments[start : start + n_together]
            tokens_BLD = torch.cat([read() for read in part])
            mask_BL = mask_BNL[:, start : start + n_together].transpose(0, 1).flatten(0, 1)
            rows = None
            if not (selection.hidden_states or selection.attentions):
                rows = _rows_with_text(mask_BL, n_documents=len(mask_BNL))
            yield from self._read_rows(tokens_BLD, mask_BL, rows, state_EBPD, selection).split(len(part))

    def _n_together(self, mask_BNL: Tensor, needs_gradient: bool) -> int:
        """Return the number of segments that run as one batch without a state: all, or up to `MOST_TOKENS` tokens.

        The limit saves memory where activations are not kept. In training without checkpointing, the backward pass
        needs the activations of all segments anyway.
        """
        n_documents, n_segments, n_tokens = mask_BNL.shape
        is_recomputed = any(layer.gradient_checkpointing and layer.training for layer in self.layers)
        is_trained = needs_gradient or any(part.requires_grad for part in self.layers.parameters())
        if torch.is_grad_enabled() and is_trained and not (is_recomputed or self.checkpoints_segments):
            return n_segments
        return max(1, MOST_TOKENS // (n_documents * n_tokens))

    def _read_rows(
        self,
        tokens_BLD: Tensor,
        mask_BL: Tensor,
        rows: Tensor | None,
        state_EBPD: Tensor | None,
        selection: OutputSelection,
    ) -> SegmentOutput:
        """Run segments that no state connects as a batch of rows; only `rows` are computed, and other rows are zero."""
        shape = tokens_BLD.shape
        if rows is not None:
            mask_BL, rows = mask_BL[rows], to_device(rows, tokens_BLD.device)
            tokens_BLD = tokens_BLD.index_select(0, rows)
        # all documents share one learned prefix
        prefix = None if state_EBPD is None else state_EBPD[:, :1].expand(-1, len(tokens_BLD), -1, -1)
        segment = self._checkpointed(tokens_BLD, mask_BL, prefix, selection)
        if rows is not None:
            assert segment.tokens is not None
            segment.tokens = segment.tokens.new_zeros(shape).index_copy(0, rows, segment.tokens)
        return segment

    def _segment(
        self, tokens_BLD: Tensor, mask_BL: Tensor, state_EBPD: Tensor | None, selection: OutputSelection
    ) -> SegmentOutput:
        recurrence, config = self.recurrence, self.config
        n_slots = recurrence.n_slots if recurrence else 0
        stream = self.embed(tokens_BLD, recurrence.slots(state_EBPD) if recurrence else None)
        visible = AttentionMasks.build(
            config, stream, mask_BL, n_slots, bool(recurrence and recurrence.slots_read_prefix)
        )
        read_prefix = recurrence.prefix_reader(state_EBPD, self.layers) if recurrence else None
        gate_EH = recurrence.prefix_gate if recurrence and config.prefix_attention == "gated" else None
        shared = recurrence.by_layer() if recurrence else {}
        slots: list[Tensor] = []
        matrices, hidden_states, attentions = [], [stream[:, n_slots:]] * selection.hidden_states, []
        for layer_idx, layer in enumerate(self.layers):
            prefix = functools.partial(read_prefix, layer_idx) if read_prefix else None
            own, matrix = slice(layer_idx, layer_idx + 1), None
            gate_1H = None if gate_EH is None else gate_EH[own]
            if recurrence and recurrence.n_matrix_rows:
                own_weights = {name: weight[own] for name, weight in shared.items()}
                matrix = functools.partial(recurrence.matrix_of_layer, state_EBPD[own], visible.is_token, own_weights)
            stream, weights, written, read_slots = layer(stream, visible, prefix, gate_1H, matrix)
            if self.final_norm is not None and layer_idx:
                # a state holds slots as the layer above reads them
                slots[-1] = read_slots.to(tokens_BLD.device)
            # layers may be on several devices
            slots.append(stream[:, :n_slots].to(tokens_BLD.device))
            matrices.append(written)
            if selection.hidden_states:
                hidden_states.append(stream[:, n_slots:])
            if selection.attentions:
                attentions.append(weights)
        memory = state_EBPD
        if recurrence:
            if self.final_norm is not None:
                slots[-1] = self.final_norm(slots[-1]).to(tokens_BLD.device)
            slots_EBPD = torch.stack(slots[-len(state_EBPD) :])
            is_read_B = mask_BL.bool().any(dim=-1)
            is_read_1B = None if is_read_B.all() else on_device(is_read_B, tokens_BLD.device).unsqueeze(0)
            written = torch.cat(matrices) if recurrence.n_matrix_rows else None
            memory = recurrence.next_state(state_EBPD, slots_EBPD, is_read_1B, shared, written)
        return SegmentOutput(stream[:, n_slots:].to(tokens_BLD.device), memory, hidden_states, attentions)


def _rows_with_text(mask_BL: Tensor, n_documents: int) -> Tensor | None:
    """Return the indices of the rows to compute, rows with text first, or None if no row can be left out.

    The number of rows is a multiple of `n_documents`, so that batches have few shapes: an attention kernel may build a
    plan for each new shape, which takes longer than a training step.
    """
    is_read_B = mask_BL.bool().any(dim=-1)
    n_rows = n_documents * max(1, -(-int(is_read_B.sum()) // n_documents))
    return None if n_rows == len(mask_BL) else (~is_read_B).int().argsort(stable=True)[:n_rows]


def _constant_segment(tokens_BLD: Tensor) -> Segment:
    return lambda: tokens_BLD


def is_wavefront_faster(segments_BNLD: Tensor) -> bool:
    """Return True if computing several layers at once is faster on the device.

    One layer already saturates a CPU, and there copying the weights costs more than it saves.
    """
    n_documents, _, n_tokens, _ = segments_BNLD.shape
    return segments_BNLD.device.type != "cpu" and n_documents * n_tokens <= MOST_TOKENS


def _chosen(is_first_B: Tensor, first_EBPD: Tensor, second_EBPD: Tensor) -> Tensor:
    """Return, per document, the first or the second state.

    The second state comes from the learned one, which thus always gets a gradient, at least zero. If a parameter gets
    no gradient in a step, ZeRO-3 uses its gradient of the step before.
    """
    return torch.where(is_first_B.view(1, -1, 1, 1), first_EBPD, second_EBPD)
