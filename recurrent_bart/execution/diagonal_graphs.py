"""CUDA graphs of diagonals for one shape of batch, and the tensors that they read and write.

Shape suffixes: B documents, N segments, S = slots and tokens of a segment, P prefix length (= slots), L tokens in a
segment, E encoder layers, D model width.
"""

import functools
import weakref
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from recurrent_bart.execution.cuda_graphs import record
from recurrent_bart.execution.graph_guards import graph_user
from recurrent_bart.execution.retained_diagonals import RetainedDiagonals
from recurrent_bart.execution.wavefront import Diagonal, Wavefront, diagonal_step
from recurrent_bart.recurrence.cell import AttentionMasks
from recurrent_bart.recurrence.grouped_linear import slice_weights
from recurrent_bart.recurrence.prefix_recurrence import Weights

# segments that are read together: one is too small to keep a GPU busy with its embedding, and what begins with each of
# them is one recording, for between two of them a GPU waits
READ_TOGETHER = 16
# settings of the layers and the recurrence whose graphs are kept, the last used ones; training and evaluation are two
MOST_SETTINGS = 4


class Captures:
    """CUDA graphs that were captured under the same settings of the layers, the recurrence and PyTorch.

    Attributes:
        graphs: By what `DiagonalGraphs.key` gives.
        seen: Keys of the diagonals that have been read.
        kept: Graphs that keep what their backward passes need.
        masks: Masks that the graphs read, of tokens and of slots; their form depends on the attention implementation.
    """

    def __init__(self, recorder: "DiagonalGraphs"):
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.seen: set[tuple] = set()
        self.kept = RetainedDiagonals(recorder)
        self.masks: list[Tensor | None] = [None, None]


class DiagonalGraphs:
    """CUDA graphs of diagonals for one shape of batch, and the tensors that they read and write.

    Args:
        wavefront: Encoder whose diagonals are captured.
        weights: Stacked weights of all layers; their values do not matter.
        tokens_BLD: Token embeddings of a segment; their values do not matter.
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
        # gradients, made when they are first needed
        self.stream_gradient = self.into_memory = torch.empty(0)
        self.weight_gradients: dict[str, Tensor] = {}
        # of diagonals that are read together: streams that enter below all layers, tokens and states above them
        self.together: tuple[Tensor, ...] = ()
        # what one recording gives back to the pool, another can take on the same stream alone
        self.where = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.user = graph_user(wavefront.recurrence)
        self.captures = Captures(self)
        self._by_settings: dict[Hashable, Captures] = {}
        # passes that have written where kept diagonals keep
        self.n_passes = 0
        self.generator = torch.cuda.default_generators[tokens_BLD.device.index]

    @property
    def top(self) -> Tensor:
        """Tokens `(B, L, D)` above the last layer."""
        return self.stream[-1][:, self.n_slots :]

    @property
    def kept(self) -> RetainedDiagonals:
        """Graphs of this pass that keep what their backward passes need."""
        return self.captures.kept

    @property
    def kept_bytes(self) -> int:
        """Bytes that the graphs of all settings keep for their backward passes."""
        return sum(captures.kept.n_bytes for captures in self._by_settings.values())

    def begin(self, weights: Weights, settings: Hashable) -> None:
        """Take the weights of this pass, and the graphs that were captured under its settings."""
        self.captures = self._by_settings.pop(settings, None) or Captures(self)
        self._by_settings[settings] = self.captures
        if len(self._by_settings) > MOST_SETTINGS:
            del self._by_settings[next(iter(self._by_settings))]
        torch._foreach_copy_(list(self.weights.values()), [weights[name].detach() for name in self.weights])

    def record(self, diagonals: list[Diagonal], with_backward: bool) -> None:
        """Record what these diagonals need and has not been recorded; the random generator stays where it is."""
        offset = self.generator.get_offset()
        if with_backward and not self.weight_gradients:
            with torch.inference_mode(False):
                self.weight_gradients = {name: torch.empty_like(weight) for name, weight in self.weights.items()}
                self.stream_gradient, self.into_memory = torch.zeros_like(self.stream), torch.empty_like(self.memory)
        # the largest first: the others find room in its memory
        for diagonal in sorted(diagonals, key=lambda it: it.first - it.stop):
            for is_backward in (False, True)[: 1 + with_backward]:
                if self.key(diagonal, is_backward) not in self.captures.graphs:
                    self.place(diagonal)
                    work = self._backward if is_backward else self._forward
                    with torch.inference_mode(False):
                        _, graph = record(functools.partial(work, diagonal), *self.where)
                    self.captures.graphs[self.key(diagonal, is_backward)] = graph
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
        (graph or self.captures.graphs[self.key(diagonal, is_backward)]).replay()

    def was_seen(self, diagonal: Diagonal) -> bool:
        """Whether one like this has been read."""
        return self.key(diagonal, False) in self.captures.seen

    def read(self, diagonals: Sequence[Diagonal], streams: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute diagonals, replayed where they are recorded, and give what each leaves above the last layer.

        Args:
            diagonals: Some that follow one another.
            streams: What enters below the first layer, `(N, B, S, D)`, for those of them that begin a segment.
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
        """Whether these are one recording: as many as that has, with all layers and nothing masked, recorded before."""
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
        """As `read`, of diagonals that are one recording."""
        assert streams is not None
        key = ("together", *self.key(diagonals[0], False))
        if key not in self.captures.graphs:
            offset = self.generator.get_offset()
            stream, memory = self.stream.clone(), self.memory.clone()
            with torch.inference_mode(False):
                self.together = self.together or tuple(
                    like.new_zeros(READ_TOGETHER, *like.shape) for like in (self.stream[0], self.top, self.memory[-1])
                )
                _, self.captures.graphs[key] = record(functools.partial(self._read_together, diagonals[0]), *self.where)
            # where they stood before it was done to be recorded
            self.stream.copy_(stream)
            self.memory.copy_(memory)
            self.generator.set_offset(offset)
        arriving, tops, memories = self.together
        arriving.copy_(streams)
        self.captures.graphs[key].replay()
        yield from zip(tops, memories.unsqueeze(1), strict=True)

    @torch.no_grad()
    def _read_together(self, diagonal: Diagonal) -> None:
        for arriving, top, memory in zip(*self.together, strict=True):
            self.stream[0].copy_(arriving)
            self._forward(diagonal)
            top.copy_(self.top)
            memory.copy_(self.memory[-1])

    def key(self, diagonal: Diagonal, is_backward: bool) -> tuple:
        """Return what a graph depends on, beside the settings and the shape of the batch."""
        has_padding = diagonal.visible.slots is not None
        return diagonal.first, diagonal.stop, has_padding, diagonal.is_read is None, is_backward

    def place(self, diagonal: Diagonal) -> None:
        """Put the masks where graphs read them."""
        places = self.captures.masks
        for number, mask in enumerate((diagonal.visible.tokens, diagonal.visible.slots)):
            if mask is None:
                continue
            if places[number] is None:
                n_rows = self.is_read.numel()
                with torch.inference_mode(False):
                    places[number] = torch.ones(n_rows, *mask.shape[1:], dtype=mask.dtype, device=mask.device)
            places[number][: len(mask)].copy_(mask)
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
        arriving = self.stream_gradient[span.start + 1 : span.stop + 1], self.into_memory[span]
        # gradients of weights are added to those of the diagonals behind, where they are
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
            # those of the next diagonal come to the same place
            masks = [None if mask is None else mask.clone() for mask in masks]
        tokens, slots, is_read = masks
        visible = AttentionMasks(tokens, slots, self.n_slots, slots_read_prefix=True)
        weights = slice_weights(stacks, diagonal.first, diagonal.stop)
        return diagonal_step(weights, self.layer(), self.recurrence(), stream, memory, visible, is_read, into)

    def begin_backward(self, into_memory: Tensor) -> None:
        """Make ready for the backward pass of the last diagonal."""
        torch._foreach_zero_(list(self.weight_gradients.values()))
        self.into_memory.copy_(into_memory)
