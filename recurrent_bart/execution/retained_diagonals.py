"""Recorded diagonals that keep what their backward passes need, as many as there is room for.

What a graph keeps lies where it was recorded, so each diagonal of a pass has graphs and memory of its own: the first
of a span, the second, and so on. A pass that is differentiated after another one has it computed again.
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

# of a device's memory
MOST_KEPT = 0.4


class RetainedDiagonals:
    """Of one shape of batch.

    Args:
        recorder: Whose streams, states and gradients they read and write.
    """

    def __init__(self, recorder: "DiagonalGraphs"):
        # it has this one
        self._recorder = weakref.ref(recorder)
        self._kept: dict[tuple, RetainedDiagonal] = {}
        self.n_bytes = 0

    def record(self, diagonals: Sequence[Diagonal], most_bytes: float) -> None:
        """Record what a pass of these needs and there is room for.

        Args:
            diagonals: In their order; each has been recorded as one that is computed again.
            most_bytes: That all together may keep.
        """
        for diagonal, key in zip(diagonals, self._keys(diagonals), strict=True):
            recorder = self._recorder()
            assert recorder is not None
            n_bytes = STREAMS_PER_CELL * recorder.stream[diagonal.first : diagonal.stop].nbytes
            if key not in self._kept and self.n_bytes + n_bytes <= most_bytes:
                self._kept[key] = RetainedDiagonal(recorder, diagonal)
                self.n_bytes += n_bytes

    def of(self, diagonals: Sequence[Diagonal]) -> "list[RetainedDiagonal | None]":
        """For each diagonal of a pass, the one that keeps it."""
        return [self._kept.get(key) for key in self._keys(diagonals)]

    def _keys(self, diagonals: Sequence[Diagonal]) -> list[tuple]:
        recorder, seen, keys = self._recorder(), Counter[tuple](), []
        assert recorder is not None
        for diagonal in diagonals:
            key = recorder.key(diagonal, is_backward=False)
            keys.append((key, seen[key]))
            seen[key] += 1
        return keys


class RetainedDiagonal:
    """Graphs of one diagonal's forward and backward pass, and what lies between them.

    Args:
        recorder: Whose it is.
        diagonal: One of its kind.
    """

    def __init__(self, recorder: "DiagonalGraphs", diagonal: Diagonal):
        span = slice(diagonal.first, diagonal.stop)
        with torch.inference_mode(False):
            self.inputs = [torch.empty_like(part[span]).requires_grad_() for part in (recorder.stream, recorder.memory)]
            recorder.place(diagonal)
            # sources of gradients and outputs, with the autograd graph between them
            self._pass: tuple[list[Tensor], list[Tensor]] = [], []
            stream, pool = recorder.where
            # memory of its own: in the others' recordings write what they need no longer
            _, self.forward = capture(functools.partial(self._compute, recorder, diagonal), stream)
            _, self.backward = capture(functools.partial(self._differentiate, recorder, span), stream, pool)

    def _compute(self, recorder: "DiagonalGraphs", diagonal: Diagonal) -> None:
        span, after = (slice(diagonal.first + more, diagonal.stop + more) for more in (0, 1))
        with torch.no_grad():
            self.inputs[0].copy_(recorder.stream[span])
            self.inputs[1].copy_(recorder.memory[span])
        outputs = self._pass = recorder.with_graph(diagonal, self.inputs)
        with torch.no_grad():
            recorder.stream[after].copy_(outputs[1][0])
            recorder.memory[span].copy_(outputs[1][1])

    def _differentiate(self, recorder: "DiagonalGraphs", span: slice) -> None:
        # what is kept stays where it is, for another backward pass
        recorder.differentiate(span, *self._pass, retain_graph=True)
