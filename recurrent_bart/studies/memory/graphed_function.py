"""Wrapper that captures a function as a CUDA graph and replays the graph.

A step of a small model is thousands of kernels. Launching the kernels takes longer than running them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.execution.cuda_graphs import capture


class GraphedFunction:
    """The function `work`; on a GPU, it is captured once per combination of input shapes.

    The first call with a shape runs the function eagerly, which creates optimizer moments and warms up libraries. The
    second call captures the function as a CUDA graph. The second call and all later calls replay the CUDA graph.

    Args:
        work: Function that returns one tensor. It must not synchronize or copy to the device. It may allocate lasting
            tensors only in the first call with a shape.
        pool: Memory pool of the CUDA graphs. Graphs that replay one after the other may share a pool.
    """

    def __init__(self, work: Callable[..., Tensor], pool: Any):
        self.work, self.pool = work, pool
        self.captured: dict[tuple[torch.Size, ...], _CapturedCall | None] = {}
        # peak GPU memory of the first calls, without memory that was allocated before the call
        self.peak_bytes = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's output."""
        if not inputs[0].is_cuda:
            return self.work(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.captured:
            self.captured[shapes] = None
            return self._first(inputs)
        call = self.captured[shapes] or _CapturedCall(self.work, inputs, self.pool)
        self.captured[shapes] = call
        return call.replay(inputs)

    def _first(self, inputs: tuple[Tensor, ...]) -> Tensor:
        # Counters of the allocator are in CPU memory, so reading a counter does not wait for the GPU.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = self.work(*inputs)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)
        return output


class _CapturedCall:
    def __init__(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any):
        # The inputs are outside the pool, because other CUDA graphs overwrite memory of the pool.
        self.inputs = [tensor.clone() for tensor in inputs]
        # Capture on the CUDA stream of the first call, because libraries keep one workspace per stream.
        self.output, self.graph = capture(lambda: work(*self.inputs), torch.cuda.current_stream(), pool)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        # the next replay of any graph in the pool may overwrite the output
        return self.output.clone()
