"""CUDA graphs of wavefront diagonals that keep activations for the backward pass, up to a memory limit.

A CUDA graph writes activations to fixed addresses. So each diagonal of a pass has its own graphs and memory, even if
diagonals compute the same layers. If a second pass runs before the backward pass of the first, that backward pass
recomputes the activations.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurrent_bart.execution.cuda_graphs import capture
from recurrent_bart.execution.wavefront import STREAMS_PER_CELL, Diagonal

if TYPE_CHECKING:
    from recurrent_bart.execution.diagonal_graphs import DiagonalGraphs

# share of a device's memory that activations may fill
MOST_RETAINED = 0.4


class RetainedDiagonals:
    """Graphs that keep activations for the backward pass, for the batch shape and buffers of a `DiagonalGraphs`."""

    def __init__(self, graphs: "DiagonalGraphs"):
        # weak, because `graphs` holds this object
        self._graphs = weakref.ref(graphs)
        self._retained: dict[tuple, RetainedDiagonal] = {}
        self.n_bytes = 0

    def capture(self, diagonals: Sequence[Diagonal], most_bytes: float) -> None:
        """Capture the graphs that a pass needs and that fit in `most_bytes`.

        `diagonals` are in order of execution. Each diagonal already has a graph that keeps no activations.
        """
        for diagonal, key in zip(diagonals, self._keys(diagonals), strict=True):
            graphs = self._graphs()
            assert graphs is not None
            n_bytes = STREAMS_PER_CELL * graphs.stream[diagonal.first : diagonal.stop].nbytes
            if key not in self._retained and self.n_bytes + n_bytes <= most_bytes:
                self._retained[key] = RetainedDiagonal(graphs, diagonal)
                self.n_bytes += n_bytes

    def of(self, diagonals: Sequence[Diagonal]) -> "list[RetainedDiagonal | None]":
        """Return one entry per diagonal of a pass: the CUDA graphs that keep its activations, or None without them."""
        return [self._retained.get(key) for key in self._keys(diagonals)]

    def _keys(self, diagonals: Sequence[Diagonal]) -> list[tuple]:
        graphs, seen, keys = self._graphs(), Counter[tuple](), []
        assert graphs is not None
        for diagonal in diagonals:
            key = graphs.key(diagonal, is_backward=False)
            keys.append((key, seen[key]))
            seen[key] += 1
        return keys


class RetainedDiagonal:
    """CUDA graphs of one diagonal's forward and backward pass, with the activations between them."""

    def __init__(self, graphs: "DiagonalGraphs", diagonal: Diagonal):
        span = slice(diagonal.first, diagonal.stop)
        with torch.inference_mode(False):
            self.inputs = [torch.empty_like(part[span]).requires_grad_() for part in (graphs.stream, graphs.memory)]
            graphs.place(diagonal)
            # inputs and outputs of the forward pass, with the autograd graph between them
            self._pass: tuple[list[Tensor], list[Tensor]] = [], []
            stream, pool = graphs.where
            # no shared pool for the forward pass: graphs that share a pool overwrite each other's activations
            _, self.forward = capture(functools.partial(self._compute, graphs, diagonal), stream)
            _, self.backward = capture(functools.partial(self._differentiate, graphs, span), stream, pool)

    def _compute(self, graphs: "DiagonalGraphs", diagonal: Diagonal) -> None:
        span, after = (slice(diagonal.first + more, diagonal.stop + more) for more in (0, 1))
        with torch.no_grad():
            self.inputs[0].copy_(graphs.stream[span])
            self.inputs[1].copy_(graphs.memory[span])
        outputs = self._pass = graphs.with_graph(diagonal, self.inputs)
        with torch.no_grad():
            graphs.stream[after].copy_(outputs[1][0])
            graphs.memory[span].copy_(outputs[1][1])

    def _differentiate(self, graphs: "DiagonalGraphs", span: slice) -> None:
        # retained, so that a second backward pass finds the activations
        graphs.differentiate(span, *self._pass, retain_graph=True)
