"""Wavefront schedule with CUDA graphs, for small batches that are limited by kernel launches on the CPU.

A graph is captured once per range of layers and serves any number of segments. The backward pass recomputes a
diagonal's activations, so no activation has to survive the next replay. Without gradient checkpointing, activations
are kept as far as memory allows.
"""

# A diagonal is a set of independent cells (segment, layer). A stream tensor holds the hidden states of slots (positions
# that write the state) and tokens.
# Shape suffixes: B documents, N segments, S = slots and tokens of a segment, P prefix length (= slots), L tokens in a
# segment, E encoder layers, D model width.

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.bart.modeling_bart import BartEncoderLayer

from recurrent_bart.execution.cuda_graphs import rng_offset
from recurrent_bart.execution.diagonal_graphs import READ_TOGETHER, DiagonalGraphs
from recurrent_bart.execution.fused_cell import can_fuse
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.execution.module_settings import backend_settings, settings_of
from recurrent_bart.execution.retained_diagonals import MOST_RETAINED
from recurrent_bart.execution.wavefront import Diagonal, Wavefront
from recurrent_bart.recurrence.prefix_recurrence import Weights
from recurrent_bart.recurrence.segmentation import Segment

# tokens of one segment over all documents. At 8,192, replays take 1 to 4 % less time than launches, and half the
# CPU time
MOST_TOKENS = 8_192
# number of batch shapes whose graphs are kept, by last use
MOST_SHAPES = 16
# processes that share the device's memory for kept activations; set by `share_device`
processes_per_device = 1


def can_graph(layer: BartEncoderLayer, weights: Weights, tokens_BLD: Tensor, checkpointing: str) -> bool:
    """Return True if CUDA graphs are faster for a batch: fused kernels exist, and the cells do not fill a GPU.

    If gradient checkpointing recomputes each diagonal anyway, graphs recompute no more, so the size does not matter.
    """
    n_documents, n_tokens, _ = tokens_BLD.shape
    return (
        (n_documents * n_tokens <= MOST_TOKENS or (checkpointing == "layer" and torch.is_grad_enabled()))
        and can_fuse(layer, tokens_BLD)
        and all((it.dtype, it.device) == (tokens_BLD.dtype, tokens_BLD.device) for it in weights.values())
        and not torch.cuda.is_current_stream_capturing()
        # replicas of DataParallel share the attributes of the module, but run in different threads
        and not getattr(layer, "_is_replica", False)
    )


@dataclass(frozen=True)
class GraphedWavefront(Wavefront):
    """Wavefront that replays CUDA graphs of diagonals, and recomputes activations that it has not kept.

    It recomputes diagonals one by one, also with `checkpointing="segment"`. Until the last segment, it yields only the
    last layer's state.
    """

    def run(
        self, weights: Weights, segments: Sequence[Segment], mask_BNL: Tensor, state_EBPD: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Run as `Wavefront.run` does. Without autograd, the next iteration overwrites a yielded state.

        Raises:
            ValueError: Another thread runs the same encoder.
        """
        steps = self._run(weights, segments, mask_BNL, state_EBPD)
        yield from graph_store(self.recurrence).user.steps_of_pass(steps)

    def _run(
        self, weights: Weights, segments: Sequence[Segment], mask_BNL: Tensor, state_EBPD: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        tokens_BLD = segments[0]()
        diagonals = self._diagonals(segments, tokens_BLD, mask_BNL)
        graphs = self._graphs_of_shape(weights, tokens_BLD)
        graphs.begin(weights, self._settings())
        if not torch.is_grad_enabled():
            yield from self._read(graphs, diagonals, state_EBPD)
            return
        streams = self._embed_segments(segments, state_EBPD)
        graphs.capture(diagonals, with_backward=True)
        if self.checkpointing == "none":
            graphs.retain(
                diagonals, MOST_RETAINED * memory_bytes(tokens_BLD.device) - self._bytes_kept_by_other_shapes(graphs)
            )
        tops, states, memory = _Replayed.apply(graphs, diagonals, list(weights), streams, state_EBPD, *weights.values())
        for number, top in enumerate(tops.unbind()):
            yield top, memory if number == len(segments) - 1 else states[number].unsqueeze(0)

    def _read(
        self, graphs: DiagonalGraphs, diagonals: list[Diagonal], state_EBPD: Tensor
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Run without autograd; in evaluation mode, capture a diagonal when it occurs for the second time."""
        again = diagonals if self.layer.training else [it for it in diagonals if graphs.was_seen(it)]
        graphs.capture(again, with_backward=False)
        graphs.memory.copy_(state_EBPD)
        for first in range(0, len(diagonals), READ_TOGETHER):
            group = diagonals[first : first + READ_TOGETHER]
            arriving = [it.segment for it in group if it.segment is not None]
            streams = self._embed_segments(arriving, state_EBPD) if arriving else None
            read = graphs.read_together if graphs.can_read_together(group) else graphs.read
            for diagonal, (top_BLD, state_1BPD) in zip(group, read(group, streams), strict=True):
                if diagonal.stop == self.config.encoder_layers:
                    is_last = diagonal is diagonals[-1]
                    tokens_BLD = top_BLD.clone() if self._gives_tokens(diagonal) else None
                    yield tokens_BLD, graphs.memory.clone() if is_last else state_1BPD

    def _settings(self) -> Hashable:
        """Return the constants that a CUDA graph keeps from its capture; all layers have the same constants."""
        return *settings_of(self.layer, self.recurrence), backend_settings()

    def _bytes_kept_by_other_shapes(self, graphs: DiagonalGraphs) -> int:
        return sum(it.retained_bytes for it in graph_store(self.recurrence).graphs.values()) - graphs.retained.n_bytes

    def _embed_segments(self, segments: Sequence[Segment], state_EBPD: Tensor) -> Tensor:
        """Return the streams `(N, B, S, D)` that enter the first layer."""
        slots = self.recurrence.slots(state_EBPD).repeat(len(segments), 1, 1)
        return self.embed(torch.cat([read() for read in segments]), slots).unflatten(0, (len(segments), -1))

    def _graphs_of_shape(self, weights: Weights, tokens_BLD: Tensor) -> DiagonalGraphs:
        stored = graph_store(self.recurrence).graphs
        key = tokens_BLD.shape, tokens_BLD.dtype, tokens_BLD.device
        graphs = stored.pop(key, None)
        if graphs is None or graphs.layer() is not self.layer:
            graphs = DiagonalGraphs(self, weights, tokens_BLD)
        stored[key] = graphs
        while len(stored) > MOST_SHAPES:
            del stored[next(iter(stored))]
        return graphs


def share_device(n_processes: int) -> None:
    """Divide the memory for kept activations among `n_processes` processes on one device."""
    global processes_per_device
    processes_per_device = n_processes


def memory_bytes(device: torch.device) -> int:
    """Return this process's share of the device's memory."""
    return torch.cuda.get_device_properties(device).total_memory // processes_per_device


class _Replayed(torch.autograd.Function):
    """Function that returns the last layer's tokens `(N, B, L, D)` and states `(N, B, P, D)`, and all final states.

    `streams` `(N, B, S, D)` are the first layer's inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        graphs: DiagonalGraphs,
        diagonals: list[Diagonal],
        names: list[str],
        streams: Tensor,
        memory: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_segments, n_layers = len(streams), len(memory)
        tops = streams.new_empty(n_segments, *graphs.top.shape)
        states = memory.new_empty(n_segments, *memory.shape[1:])
        graphs.memory.copy_(memory)
        graphs.n_passes += 1
        entered = []
        for number, (diagonal, retained) in enumerate(zip(diagonals, graphs.retained.of(diagonals), strict=True)):
            span = slice(diagonal.first, diagonal.stop)
            if number < n_segments:
                graphs.stream[0].copy_(streams[number])
            here = graphs.stream[span].clone(), graphs.memory[span].clone(), graphs.generator.get_offset()
            entered.append(here)
            graphs.replay(diagonal, graph=retained.forward if retained else None)
            if diagonal.stop == n_layers:
                tops[number - n_layers + 1].copy_(graphs.top)
                states[number - n_layers + 1].copy_(graphs.memory[-1])
        ctx.graphs, ctx.diagonals, ctx.entered, ctx.names = graphs, diagonals, entered, names
        ctx.captures = graphs.captures
        ctx.n_passes = graphs.n_passes
        ctx.shape = streams.shape
        return tops, states, graphs.memory.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        with graphs.user.whole_pass():
            # the settings may have changed since the forward pass
            graphs.captures = ctx.captures
            grad_streams = _differentiate(ctx, *gradients)
            weight_gradients = [graphs.weight_gradients[name].clone() for name in ctx.names]
            return None, None, None, grad_streams, graphs.into_memory.clone(), *weight_gradients


def _differentiate(ctx: Any, grad_tops: Tensor, grad_memories: Tensor, grad_memory: Tensor) -> Tensor:
    """Replay the backward passes of all diagonals; the buffers then hold the gradients of weights and states.

    Returns:
        Gradients of the streams that entered the first layer.
    """
    graphs, n_layers = ctx.graphs, len(grad_memory)
    grad_streams = grad_tops.new_empty(ctx.shape)
    graphs.begin_backward(grad_memory)
    retained = graphs.retained.of(ctx.diagonals)
    for number in reversed(range(len(ctx.diagonals))):
        diagonal, (stream, memory, offset) = ctx.diagonals[number], ctx.entered[number]
        # a later pass has overwritten the kept activations
        own = retained[number] if ctx.n_passes == graphs.n_passes else None
        if own is None:
            span = slice(diagonal.first, diagonal.stop)
            graphs.stream[span].copy_(stream)
            graphs.memory[span].copy_(memory)
        if diagonal.stop == n_layers:
            graphs.stream_gradient[-1][:, graphs.n_slots :].copy_(grad_tops[number - n_layers + 1])
            graphs.into_memory[-1].add_(grad_memories[number - n_layers + 1])
        with rng_offset(graphs.generator, offset):
            graphs.replay(diagonal, is_backward=True, graph=own.backward if own else None)
        if number < len(grad_streams):
            grad_streams[number].copy_(graphs.stream_gradient[0])
    return grad_streams
