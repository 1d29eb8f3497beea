"""CUDA graphs of wavefront diagonals for one batch shape, and the input and output buffers of these graphs."""

# A diagonal is a set of independent cells (segment, layer). A stream tensor holds the hidden states of slots (positions
# that write the state) and tokens.
# Shape suffixes: B documents, N segments, S = slots and tokens of a segment, P prefix length (= slots), L tokens in a
# segment, E encoder layers, D model width.

import functools
import weakref
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from recurrent_bart.execution.cuda_graphs import warm_up_and_capture
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.execution.retained_diagonals import RetainedDiagonals
from recurrent_bart.execution.wavefront import Diagonal, Wavefront, diagonal_step
from recurrent_bart.recurrence.cell import AttentionMasks
from recurrent_bart.recurrence.grouped_linear import slice_weights
from recurrent_bart.recurrence.prefix_recurrence import Weights

# number of segments in one graph without autograd. Embedding one segment cannot keep a GPU busy, and a GPU idles
# between two replays
READ_TOGETHER = 16
# number of settings (of layers and recurrence) whose graphs are kept, by last use; training and evaluation are two
MOST_SETTINGS = 4


class Captures:
    """CUDA graphs that were captured under the same settings of the layers, the recurrence and PyTorch."""

    def __init__(self, owner: "DiagonalGraphs"):
        # by `DiagonalGraphs.key`
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        # keys of the diagonals that have run
        self.seen: set[tuple] = set()
        # graphs that keep the activations for their backward passes
        self.retained = RetainedDiagonals(owner)
        # buffers of the masks of tokens and of slots; their form depends on the attention implementation
        self.masks: list[Tensor | None] = [None, None]


class DiagonalGraphs:
    """CUDA graphs of diagonals for one batch shape, and the input and output buffers of these graphs.

    `weights` and `tokens_BLD` (embeddings of a segment) give shapes and dtypes; their values do not matter.
    """

    def __init__(self, wavefront: Wavefront, weights: Weights, tokens_BLD: Tensor):
        # weak references: the graphs must not keep the modules alive
        self.layer, self.recurrence = weakref.ref(wavefront.layer), weakref.ref(wavefront.recurrence)
        n_layers, self.n_slots = wavefront.config.encoder_layers, wavefront.recurrence.n_slots
        n_documents, n_tokens, width = tokens_BLD.shape
        with torch.inference_mode(False):
            # entry i enters layer i; the last entry leaves the last layer
            self.stream = tokens_BLD.new_zeros(n_layers + 1, n_documents, self.n_slots + n_tokens, width)
            self.memory = tokens_BLD.new_zeros(n_layers, n_documents, self.n_slots, width)
            self.weights = {name: torch.empty_like(weight, requires_grad=False) for name, weight in weights.items()}
            self.is_read = torch.zeros(n_layers, n_documents, dtype=torch.bool, device=tokens_BLD.device)
        # gradients, allocated by the first backward pass
        self.stream_gradient = self.into_memory = torch.empty(0)
        self.weight_gradients: dict[str, Tensor] = {}
        # buffers of a graph of several diagonals: streams into the first layer, tokens and states of the last layer
        self.together: tuple[Tensor, ...] = ()
        # one stream for all captures: memory that a graph returns to the pool can be reused on the same stream only
        self.where = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.user = graph_store(wavefront.recurrence).user
        self.captures = Captures(self)
        self._by_settings: dict[Hashable, Captures] = {}
        # number of passes that have overwritten the kept activations
        self.n_passes = 0
        self.generator = torch.cuda.default_generators[tokens_BLD.device.index]

    @property
    def top(self) -> Tensor:
        """Tokens `(B, L, D)` above the last layer."""
        return self.stream[-1][:, self.n_slots :]

    @property
    def retained(self) -> RetainedDiagonals:
        """Graphs under the current settings that keep activations for the backward pass."""
        return self.captures.retained

    @property
    def retained_bytes(self) -> int:
        """Number of bytes of the activations that graphs keep, under all settings."""
        return sum(captures.retained.n_bytes for captures in self._by_settings.values())

    def begin(self, weights: Weights, settings: Hashable) -> None:
        """Copy `weights` to the buffers, and select the graphs that were captured under `settings`."""
        self.captures = self._by_settings.pop(settings, None) or Captures(self)
        self._by_settings[settings] = self.captures
        if len(self._by_settings) > MOST_SETTINGS:
            del self._by_settings[next(iter(self._by_settings))]
        torch._foreach_copy_(list(self.weights.values()), [weights[name].detach() for name in self.weights])

    def capture(self, diagonals: list[Diagonal], with_backward: bool) -> None:
        """Capture the missing graphs of these diagonals; the random generator's offset does not change."""
        offset = self.generator.get_offset()
        if with_backward and not self.weight_gradients:
            with torch.inference_mode(False):
                self.weight_gradients = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
                self.stream_gradient, self.into_memory = torch.zeros_like(self.stream), torch.empty_like(self.memory)
        # the largest first: smaller graphs then fit into its pool memory
        for diagonal in sorted(diagonals, key=lambda it: it.first - it.stop):
            for is_backward in (False, True)[: 1 + with_backward]:
                if self.key(diagonal, is_backward) not in self.captures.graphs:
                    self.place(diagonal)
                    work = self._backward if is_backward else self._forward
                    with torch.inference_mode(False):
                        _, graph = warm_up_and_capture(functools.partial(work, diagonal), *self.where)
                    self.captures.graphs[self.key(diagonal, is_backward)] = graph
        self.generator.set_offset(offset)

    def retain(self, diagonals: list[Diagonal], most_bytes: float) -> None:
        """Capture graphs that keep activations for the backward pass, up to `most_bytes` of memory."""
        offset = self.generator.get_offset()
        self.retained.capture(diagonals, most_bytes)
        self.generator.set_offset(offset)

    def replay(self, diagonal: Diagonal, is_backward: bool = False, graph: torch.cuda.CUDAGraph | None = None) -> None:
        """Replay a diagonal's forward or backward pass; `graph=None` uses the graph that keeps no activations."""
        self.place(diagonal)
        (graph or self.captures.graphs[self.key(diagonal, is_backward)]).replay()

    def was_seen(self, diagonal: Diagonal) -> bool:
        """Return True if a diagonal with the same key has run."""
        return self.key(diagonal, False) in self.captures.seen

    def read(self, diagonals: Sequence[Diagonal], streams: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Run consecutive diagonals, by replay if a graph exists; yield the last layer's tokens and state after each.

        `streams` `(N, B, S, D)` holds the first layer's inputs, one for each diagonal that begins a segment.
        """
        for number, diagonal in enumerate(diagonals):
            if diagonal.segment is not None and streams is not None:
                self.stream[0].copy_(streams[number])
            key = self.key(diagonal, False)
            self.captures.seen.add(key)
            if key in self.captures.graphs:
                self.replay(diagonal)
            else:
                self.place(diagonal)
                self._forward(diagonal)
            yield self.top, self.memory[-1:]

    def can_read_together(self, diagonals: Sequence[Diagonal]) -> bool:
        """Return True if one graph can run these diagonals: `READ_TOGETHER` captured ones, all layers, no masks."""
        keys = {self.key(diagonal, False) for diagonal in diagonals}
        diagonal = diagonals[0]
        return (
            len(diagonals) == READ_TOGETHER
            and len(keys) == 1
            and keys <= self.captures.graphs.keys()
            and diagonal.stop - diagonal.first == len(self.memory)
            and diagonal.segment is not None
            and diagonal.visible.slots is None
            and diagonal.is_read is None
        )

    def read_together(self, diagonals: Sequence[Diagonal], streams: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Run all diagonals by one graph; arguments and results are as in `read`."""
        assert streams is not None
        key = ("together", *self.key(diagonals[0], False))
        if key not in self.captures.graphs:
            offset = self.generator.get_offset()
            stream, memory = self.stream.clone(), self.memory.clone()
            with torch.inference_mode(False):
                self.together = self.together or tuple(
                    like.new_zeros(READ_TOGETHER, *like.shape) for like in (self.stream[0], self.top, self.memory[-1])
                )
                _, self.captures.graphs[key] = warm_up_and_capture(
                    functools.partial(self._read_together, diagonals[0]), *self.where
                )
            # restore the buffers, which the warm-up before the capture has changed
            self.stream.copy_(stream)
            self.memory.copy_(memory)
            self.generator.set_offset(offset)
        arriving, tops, states = self.together
        arriving.copy_(streams)
        self.captures.graphs[key].replay()
        yield from zip(tops, states.unsqueeze(1), strict=True)

    @torch.no_grad()
    def _read_together(self, diagonal: Diagonal) -> None:
        for arriving, top, memory in zip(*self.together, strict=True):
            self.stream[0].copy_(arriving)
            self._forward(diagonal)
            top.copy_(self.top)
            memory.copy_(self.memory[-1])

    def key(self, diagonal: Diagonal, is_backward: bool) -> tuple:
        """Return the key of a diagonal's graph among the graphs with the same settings and batch shape."""
        has_padding = diagonal.visible.slots is not None
        return diagonal.first, diagonal.stop, has_padding, diagonal.is_read is None, is_backward

    def place(self, diagonal: Diagonal) -> None:
        """Copy the diagonal's masks to the buffers that the graphs read."""
        buffers = self.captures.masks
        for number, mask in enumerate((diagonal.visible.tokens, diagonal.visible.slots)):
            if mask is None:
                continue
            if buffers[number] is None:
                n_rows = self.is_read.numel()
                with torch.inference_mode(False):
                    buffers[number] = torch.ones(n_rows, *mask.shape[1:], dtype=mask.dtype, device=mask.device)
            buffers[number][: len(mask)].copy_(mask)
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
        """Run a diagonal with autograd. Return the inputs (stream, state, weights), and the new value of each."""
        stacks = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        given_on = dict(stacks)
        outputs = self._step(diagonal, given_on, inputs[0], inputs[1])
        return [*inputs, *stacks.values()], [*outputs, *given_on.values()]

    def differentiate(
        self, span: slice, sources: list[Tensor], outputs: list[Tensor], retain_graph: bool = False
    ) -> None:
        """Compute gradients of `sources` from the buffered gradients of `outputs`, and write them to the buffers."""
        arriving = self.stream_gradient[span.start + 1 : span.stop + 1], self.into_memory[span]
        # weight gradients accumulate in place in their buffers
        stream_gradient, into_memory, *_ = torch.autograd.grad(
            outputs, sources, [*arriving, *self.weight_gradients.values()], retain_graph=retain_graph
        )
        self.stream_gradient[span].copy_(stream_gradient)
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
        masks = [mask[:n_rows] if has_padding else None for mask in self.captures.masks]
        masks.append(None if diagonal.is_read is None else self.is_read[:n_layers])
        if torch.is_grad_enabled():
            # the next diagonal overwrites the mask buffers, and the backward pass needs these masks
            masks = [None if mask is None else mask.clone() for mask in masks]
        tokens, slots, is_read = masks
        visible = AttentionMasks(tokens, slots, self.n_slots, slots_read_prefix=True)
        weights = slice_weights(stacks, diagonal.first, diagonal.stop)
        return diagonal_step(weights, self.layer(), self.recurrence(), stream, memory, visible, is_read, into)

    def begin_backward(self, into_memory: Tensor) -> None:
        """Reset the weight gradients and set the gradient of the final state."""
        torch._foreach_zero_(list(self.weight_gradients.values()))
        self.into_memory.copy_(into_memory)
