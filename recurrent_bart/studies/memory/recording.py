"""Work that a GPU does over and over, recorded as a CUDA graph and replayed.

A step of a small model is thousands of kernels, which take longer to be launched one by one than to be done.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.execution.cuda_graphs import capture


class Recorded:
    """Identical to a function of tensors except: on a GPU it is recorded, once for each shape of what it is given.

    The first call with a shape is the function's own: it makes what stays, such as an optimizer's moments, and warms
    libraries up. The second records it, and replays the recording like all that follow.

    Args:
        work: Gives one tensor; it looks at no value that the device has, and copies nothing to it. What it makes and
            keeps it makes in its first call with a shape.
        pool: Memory of recordings, on a GPU. They may share it if they are replayed one after the other.

    Attributes:
        peak_bytes: Most memory that a first call took on a GPU beyond what was taken before it.
    """

    def __init__(self, work: Callable[..., Tensor], pool: Any):
        self.work, self.pool = work, pool
        self.recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}
        self.peak_bytes = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives."""
        if not inputs[0].is_cuda:
            return self.work(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = None
            return self._first(inputs)
        recording = self.recordings[shapes] or _Recording(self.work, inputs, self.pool)
        self.recordings[shapes] = recording
        return recording.replay(inputs)

    def _first(self, inputs: tuple[Tensor, ...]) -> Tensor:
        # known on the host, which waits for nothing
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = self.work(*inputs)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)
        return output


class _Recording:
    """One shape's: where it reads its inputs, and where it leaves its output."""

    def __init__(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any):
        # not of the pool, which other recordings write to
        self.inputs = [tensor.clone() for tensor in inputs]
        # on the stream of the first call: libraries keep their workspace by stream
        self.output, self.graph = capture(lambda: work(*self.inputs), torch.cuda.current_stream(), pool)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # the next replay, of any recording of the pool, may write over it
        return self.output.clone()
