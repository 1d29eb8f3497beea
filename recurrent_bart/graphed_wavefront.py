"""Diagonals recorded as CUDA graphs, for batches that leave a GPU waiting for the processor.

A small batch's kernels take less time than launching them one by one. Recorded once for each span of layers, whatever
the number of segments, they are launched together. What a diagonal keeps for its backward pass is computed again there,
so that nothing recorded has to outlive the next replay; without checkpointing, as much as there is room for is kept.

Shape suffixes: B documents, N segments, S = slots and tokens of a segment, P prefix length (= slots), L tokens in a
segment, E encoder layers, D model width.
"""

import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.encoder_cell import Visibility
from recurrent_bart.fused_cell import can_fuse
from recurrent_bart.kept_diagonals import MOST_KEPT, KeptDiagonals
from recurrent_bart.layer_spans import take_span
from recurrent_bart.prefix_recurrence import Weights
from recurrent_bart.recorded_call import drawing_from, record
from recurrent_bart.segmentation import Segment
from recurrent_bart.wavefront import Diagonal, Wavefront, diagonal_step

# of all documents in a segment; at 8,192, for whose diagonals there was no room, replays took as long as launching did
MOST_TOKENS = 4_096
# shapes of batches whose recordings are kept, the last used ones
MOST_SHAPES = 16
# segments whose streams are embedded together in reading, for one is too small to keep a GPU busy
EMBEDDED_TOGETHER = 8
_recorders: weakref.WeakKeyDictionary[nn.Module, dict[tuple, "Recorder"]] = weakref.WeakKeyDictionary()


def can_graph(config: RecurrentBartConfig, weights: Weights, tokens_BLD: Tensor, checkpointing: str) -> bool:
    """Whether such a batch is better replayed: its diagonals are fused, and too small to keep a GPU busy.

    Where each diagonal is recomputed in any case, replays cost nothing, however large they are.
    """
    n_documents, n_tokens, _ = tokens_BLD.shape
    return (
        (n_documents * n_tokens <= MOST_TOKENS or (checkpointing == "layer" and torch.is_grad_enabled()))
        and can_fuse(config, tokens_BLD)
        and all(weight.dtype == tokens_BLD.dtype for weight in weights.values())
        and not torch.cuda.is_current_stream_capturing()
    )


@dataclass(frozen=True)
class GraphedWavefront(Wavefront):
    """Identical to Wavefront except: diagonals are replayed, and recomputed in the backward pass unless kept."""

    def run(
        self, weights: Weights, segments: Sequence[Segment], mask_BNL: Tensor, memory_EBPD: Tensor | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """As Wavefront's; the states that it gives but for the last are those of the last layer alone.

        Without a graph they hold until the next ones are asked for.
        """
        assert memory_EBPD is not None
        tokens_BLD = segments[0]()
        diagonals = self._diagonals(segments, tokens_BLD, mask_BNL)
        recorder = self._recorder(weights, tokens_BLD)
        recorder.load(weights)
        if not torch.is_grad_enabled():
            yield from self._read(recorder, diagonals, memory_EBPD)
            return
        streams = self._embed_segments(segments, memory_EBPD)
        recorder.record(diagonals, with_backward=True)
        if self.checkpointing == "none":
            recorder.keep(diagonals, MOST_KEPT * memory_bytes(tokens_BLD.device) - self._kept_elsewhere(recorder))
        tops, memories, memory = _Replayed.apply(
            recorder, diagonals, list(weights), streams, memory_EBPD, *weights.values()
        )
        for number, top in enumerate(tops.unbind()):
            yield top, memory if number == len(segments) - 1 else memories[number].unsqueeze(0)

    def _read(
        self, recorder: "Recorder", diagonals: list[Diagonal], memory_EBPD: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Forward passes alone; outside training, what comes for the first time is not worth a recording."""
        again = diagonals if self.layer.training else [it for it in diagonals if recorder.was_seen(it)]
        recorder.record(again, with_backward=False)
        recorder.memory.copy_(memory_EBPD)
        for number, diagonal in enumerate(diagonals):
            if diagonal.segment is not None:
                place = number % EMBEDDED_TOGETHER
                if place == 0:
                    next_ones = diagonals[number : number + EMBEDDED_TOGETHER]
                    streams = self._embed_segments([it.segment for it in next_ones if it.segment], memory_EBPD)
                recorder.stream[0].copy_(streams[place])
            recorder.read(diagonal)
            if diagonal.stop == self.config.encoder_layers:
                is_last = diagonal is diagonals[-1]
                tokens_BLD = recorder.top.clone() if self._gives_tokens(diagonal) else None
                yield tokens_BLD, recorder.memory.clone() if is_last else recorder.memory[-1:]

    def _kept_elsewhere(self, recorder: "Recorder") -> int:
        return sum(it.kept.n_bytes for it in _recorders[self.recurrence].values() if it is not recorder)

    def _embed_segments(self, segments: Sequence[Segment], memory_EBPD: Tensor) -> Tensor:
        """Streams `(N, B, S, D)` that enter below the first layer."""
        assert self.recurrence is not None
        slots = self.recurrence.slots(memory_EBPD).repeat(len(segments), 1, 1)
        return self.embed(torch.cat([read() for read in segments]), slots).unflatten(0, (len(segments), -1))

    def _recorder(self, weights: Weights, tokens_BLD: Tensor) -> "Recorder":
        """Recordings for batches of this shape."""
        kept = _recorders.setdefault(self.recurrence, {})
        key = tokens_BLD.shape, tokens_BLD.dtype, tokens_BLD.device
        recorder = kept.pop(key, None)
        if recorder is None or recorder.layer() is not self.layer:
            recorder = Recorder(self, weights, tokens_BLD)
        kept[key] = recorder
        while len(kept) > MOST_SHAPES:
            del kept[next(iter(kept))]
        return recorder


def memory_bytes(device: torch.device) -> int:
    """All that a device has."""
    return torch.cuda.get_device_properties(device).total_memory


class Recorder:
    """Graphs of diagonals for one shape of batch, and the tensors that they read and write.

    Args:
        wavefront: Whose diagonals.
        weights: Of all layers, stacked; any.
        tokens_BLD: Token embeddings of a segment; any.
    """

    def __init__(self, wavefront: Wavefront, weights: Weights, tokens_BLD: Tensor):
        # not the modules themselves, which this must not keep alive
        self.layer, self.recurrence = weakref.ref(wavefront.layer), weakref.ref(wavefront.recurrence)
        n_layers, self.n_slots = wavefront.config.encoder_layers, wavefront.n_slots
        n_documents, n_tokens, width = tokens_BLD.shape
        with torch.inference_mode(False):
            # one more than there are layers: below the first and above the last; what leaves one enters the next
            self.stream = tokens_BLD.new_zeros(n_layers + 1, n_documents, self.n_slots + n_tokens, width)
            self.memory = tokens_BLD.new_zeros(n_layers, n_documents, self.n_slots, width)
            self.weights = {name: torch.empty_like(weight, requires_grad=False) for name, weight in weights.items()}
            self.is_read = torch.zeros(n_layers, n_documents, dtype=torch.bool, device=tokens_BLD.device)
        self.masks: list[Tensor | None] = [None, None]
        # gradients, made when they are first needed
        self.into_stream = self.into_memory = torch.empty(0)
        self.into_weights: dict[str, Tensor] = {}
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple] = set()
        # what one recording gives back to the pool, another can take on the same stream alone
        self.where = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.kept = KeptDiagonals(self)
        # passes that have written where kept diagonals keep
        self.n_passes = 0
        self.generator = torch.cuda.default_generators[tokens_BLD.device.index]

    @property
    def top(self) -> Tensor:
        """Tokens `(B, L, D)` above the last layer."""
        return self.stream[-1][:, self.n_slots :]

    def load(self, weights: Weights) -> None:
        """Take the weights of this pass."""
        torch._foreach_copy_(list(self.weights.values()), [weights[name].detach() for name in self.weights])

    def record(self, diagonals: list[Diagonal], with_backward: bool) -> None:
        """Record what these diagonals need and has not been recorded; the random generator stays where it is."""
        offset = self.generator.get_offset()
        if with_backward and not self.into_weights:
            with torch.inference_mode(False):
                self.into_weights = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
                self.into_stream, self.into_memory = torch.zeros_like(self.stream), torch.empty_like(self.memory)
        # the largest first: the others find room in its memory
        for diagonal in sorted(diagonals, key=lambda it: it.first - it.stop):
            for is_backward in (False, True)[: 1 + with_backward]:
                if self.key(diagonal, is_backward) not in self.graphs:
                    self.place(diagonal)
                    work = self._backward if is_backward else self._forward
                    with torch.inference_mode(False):
                        _, graph = record(functools.partial(work, diagonal), *self.where)
                    self.graphs[self.key(diagonal, is_backward)] = graph
        self.generator.set_offset(offset)

    def keep(self, diagonals: list[Diagonal], most_bytes: float) -> None:
        """Record them as diagonals that keep what their backward passes need, where there is room."""
        offset = self.generator.get_offset()
        self.kept.record(diagonals, most_bytes)
        self.generator.set_offset(offset)

    def replay(self, diagonal: Diagonal, is_backward: bool = False, graph: torch.cuda.CUDAGraph | None = None) -> None:
        """Compute a diagonal: from the streams and states that are there, those that it leaves; or their gradients.

        Args:
            diagonal: Of which kind.
            is_backward: Whether gradients are wanted.
            graph: One that does so; None: that which keeps nothing.
        """
        self.place(diagonal)
        (graph or self.graphs[self.key(diagonal, is_backward)]).replay()

    def was_seen(self, diagonal: Diagonal) -> bool:
        """Whether one like this has been read."""
        return self.key(diagonal, False) in self._seen

    def read(self, diagonal: Diagonal) -> None:
        """As `replay`, but computed as it is where it has no recording."""
        key = self.key(diagonal, False)
        self._seen.add(key)
        if key in self.graphs:
            self.replay(diagonal)
        else:
            self.place(diagonal)
            self._forward(diagonal)

    def key(self, diagonal: Diagonal, is_backward: bool) -> tuple:
        """What a recording depends on."""
        has_padding = diagonal.visible.slots is not None
        is_training = self.layer().training
        return diagonal.first, diagonal.stop, has_padding, diagonal.is_read is None, is_training, is_backward

    def place(self, diagonal: Diagonal) -> None:
        """Put the masks where graphs read them."""
        for number, mask in enumerate((diagonal.visible.tokens, diagonal.visible.slots)):
            if mask is None:
                continue
            if self.masks[number] is None:
                n_rows = self.is_read.numel()
                with torch.inference_mode(False):
                    self.masks[number] = torch.ones(n_rows, *mask.shape[1:], dtype=mask.dtype, device=mask.device)
            self.masks[number][: len(mask)].copy_(mask)
        if diagonal.is_read is not None:
            self.is_read[: len(diagonal.is_read)].copy_(diagonal.is_read)

    @torch.no_grad()
    def _forward(self, diagonal: Diagonal) -> None:
        first, stop = diagonal.first, diagonal.stop
        stream, memory = self.stream[first:stop], self.memory[first:stop]
        self._step(diagonal, dict(self.weights), stream, memory, (self.stream[first + 1 : stop + 1], memory))

    def _backward(self, diagonal: Diagonal) -> None:
        span = slice(diagonal.first, diagonal.stop)
        inputs = [part[span].detach().requires_grad_() for part in (self.stream, self.memory)]
        self.differentiate(span, *self.with_graph(diagonal, inputs))

    @torch.enable_grad()
    def with_graph(self, diagonal: Diagonal, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A diagonal with its autograd graph: its sources, streams, states and weights; and what came of each."""
        stacks = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        given_on = dict(stacks)
        outputs = self._step(diagonal, given_on, inputs[0], inputs[1])
        return [*inputs, *stacks.values()], [*outputs, *given_on.values()]

    def differentiate(
        self, span: slice, sources: list[Tensor], outputs: list[Tensor], retain_graph: bool = False
    ) -> None:
        """From gradients of what `with_graph` gave, where they arrive, those of its sources, where these are."""
        arriving = self.into_stream[span.start + 1 : span.stop + 1], self.into_memory[span]
        # gradients of weights are added to those of the diagonals behind, where they are
        into_stream, into_memory, *_ = torch.autograd.grad(
            outputs, sources, [*arriving, *self.into_weights.values()], retain_graph=retain_graph
        )
        self.into_stream[span].copy_(into_stream)
        self.into_memory[span].copy_(into_memory)

    def _step(
        self,
        diagonal: Diagonal,
        stacks: dict[str, Tensor],
        stream: Tensor,
        memory: Tensor,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        n_layers, n_rows = stream.shape[0], stream.shape[0] * stream.shape[1]
        has_padding = diagonal.visible.slots is not None
        masks = [mask[:n_rows] if has_padding else None for mask in self.masks]
        masks.append(None if diagonal.is_read is None else self.is_read[:n_layers])
        if torch.is_grad_enabled():
            # those of the next diagonal come to the same place
            masks = [None if mask is None else mask.clone() for mask in masks]
        tokens, slots, is_read = masks
        visible = Visibility(tokens, slots, self.n_slots, slots_read_prefix=True)
        weights = take_span(stacks, diagonal.first, diagonal.stop)
        return diagonal_step(weights, self.layer(), self.recurrence(), stream, memory, visible, is_read, into)

    def begin_backward(self, into_memory: Tensor) -> None:
        """Make ready for the backward pass of the last diagonal."""
        torch._foreach_zero_(list(self.into_weights.values()))
        self.into_memory.copy_(into_memory)


class _Replayed(torch.autograd.Function):
    """Tokens above the last layer `(N, B, L, D)`, its states `(N, B, P, D)`, and all states at the end.

    Takes the streams `(N, B, S, D)` that enter below the first layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        diagonals: list[Diagonal],
        names: list[str],
        streams: Tensor,
        memory: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_segments, n_layers = len(streams), len(memory)
        tops = streams.new_empty(n_segments, *recorder.top.shape)
        memories = memory.new_empty(n_segments, *memory.shape[1:])
        recorder.memory.copy_(memory)
        recorder.n_passes += 1
        entered = []
        for number, (diagonal, kept) in enumerate(zip(diagonals, recorder.kept.of(diagonals), strict=True)):
            span = slice(diagonal.first, diagonal.stop)
            if number < n_segments:
                recorder.stream[0].copy_(streams[number])
            here = recorder.stream[span].clone(), recorder.memory[span].clone(), recorder.generator.get_offset()
            entered.append(here)
            recorder.replay(diagonal, graph=kept.forward if kept else None)
            if diagonal.stop == n_layers:
                tops[number - n_layers + 1].copy_(recorder.top)
                memories[number - n_layers + 1].copy_(recorder.memory[-1])
        ctx.recorder, ctx.diagonals, ctx.entered, ctx.names = recorder, diagonals, entered, names
        ctx.n_passes = recorder.n_passes
        ctx.shape = streams.shape
        return tops, memories, recorder.memory.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_tops: Tensor, into_memories: Tensor, into_memory: Tensor) -> tuple[Tensor | None, ...]:
        recorder, n_layers = ctx.recorder, len(into_memory)
        into_streams = into_tops.new_empty(ctx.shape)
        recorder.begin_backward(into_memory)
        kept = recorder.kept.of(ctx.diagonals)
        for number in reversed(range(len(ctx.diagonals))):
            diagonal, (stream, memory, offset) = ctx.diagonals[number], ctx.entered[number]
            # another pass keeps its own there now
            own = kept[number] if ctx.n_passes == recorder.n_passes else None
            if own is None:
                span = slice(diagonal.first, diagonal.stop)
                recorder.stream[span].copy_(stream)
                recorder.memory[span].copy_(memory)
            if diagonal.stop == n_layers:
                recorder.into_stream[-1][:, recorder.n_slots :].copy_(into_tops[number - n_layers + 1])
                recorder.into_memory[-1].add_(into_memories[number - n_layers + 1])
            with drawing_from(recorder.generator, offset):
                recorder.replay(diagonal, is_backward=True, graph=own.backward if own else None)
            if number < len(into_streams):
                into_streams[number].copy_(recorder.into_stream[0])
        into_weights = [recorder.into_weights[name].clone() for name in ctx.names]
        return None, None, None, into_streams, recorder.into_memory.clone(), *into_weights
