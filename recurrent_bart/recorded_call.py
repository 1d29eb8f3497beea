"""A function of tensors recorded as CUDA graphs, with its backward pass.

For work whose kernels take less time than launching them one by one. The backward pass computes the function again, so
that nothing recorded has to outlive the next replay.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from recurrent_bart.segmentation import is_sharded

# shapes whose recordings are kept of a module, the last used ones
MOST_SHAPES = 32
_recorded: weakref.WeakKeyDictionary[nn.Module, "RecordedModule"] = weakref.WeakKeyDictionary()


def can_record(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a training step may replay a module: its weights stay where they are, and nobody listens to its parts."""
    parameters = list(module.parameters())
    return (
        torch.is_grad_enabled()
        and all(part.is_cuda for part in (*inputs, *parameters))
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
        # ZeRO-3 gathers them elsewhere each time
        and not is_sharded(module)
        and not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in module.modules())
    )


def call_recorded(
    module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor], *settings: Hashable
) -> Tensor:
    """What a function gives for these inputs, by a replay; it is recorded for each shape that inputs have.

    Args:
        module: Whose parameters it uses.
        function: Gives one tensor from something that calls the module with keyword arguments, and the inputs; how it
            works depends on their shapes, on `module.training` and on `settings` alone.
        inputs: On the device.
        settings: What else it depends on.
    """
    recorded = _recorded.get(module)
    if recorded is None or not recorded.is_of(module):
        recorded = _recorded[module] = RecordedModule(module)
    shapes = tuple((part.shape, part.dtype, part.requires_grad) for part in inputs)
    call = recorded.call((shapes, settings, module.training), functools.partial(RecordedCall, module, function, inputs))
    return _Replayed.apply(call, len(inputs), *inputs, *(part for part in module.parameters() if part.requires_grad))


class RecordedModule:
    """Recordings of a module, which work in the same memory, one after the other.

    Attributes:
        weights: The module's, the same numbers, but leaves of graphs that nobody else has made, on another stream.
        into_weights: Gradients of those that have some, of the last replay.
    """

    def __init__(self, module: nn.Module):
        self.weights = {name: it.detach().requires_grad_(it.requires_grad) for name, it in module.named_parameters()}
        with torch.no_grad():
            self.into_weights = [torch.zeros_like(part) for part in self.weights.values() if part.requires_grad]
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.calls: dict[Hashable, RecordedCall] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module's parameters are still where they were."""
        found = [(part.data_ptr(), part.requires_grad) for part in module.parameters()]
        return found == [(part.data_ptr(), part.requires_grad) for part in self.weights.values()]

    def call(self, key: Hashable, build: Callable[["RecordedModule"], "RecordedCall"]) -> "RecordedCall":
        """The recording of a shape; the oldest is forgotten where there are too many."""
        self.calls[key] = self.calls.pop(key) if key in self.calls else build(self)
        if len(self.calls) > MOST_SHAPES:
            del self.calls[next(iter(self.calls))]
        return self.calls[key]


class RecordedCall:
    """Graphs of a function and of its backward pass, and the tensors that they read and write."""

    def __init__(
        self, module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor], shared: RecordedModule
    ):
        self.inputs = [part.detach().clone().requires_grad_(part.requires_grad) for part in inputs]
        self.shared = shared

        def work() -> Tensor:
            return function(lambda **inputs: functional_call(module, shared.weights, kwargs=inputs), *self.inputs)

        self.generator = torch.cuda.default_generators[inputs[0].device.index]
        self.into_out = torch.empty(0)
        # numbers of the weights that get no gradient
        self.unused: list[int] = []
        offset = self.generator.get_offset()
        self.out, self.forward = record(lambda: self._compute(work), shared.stream, shared.pool)
        self.into_inputs, self.backward = record(lambda: self._differentiate(work), shared.stream, shared.pool)
        self.generator.set_offset(offset)

    @torch.no_grad()
    def _compute(self, work: Callable[[], Tensor]) -> Tensor:
        out = work()
        if not self.into_out.numel():
            self.into_out = torch.zeros_like(out)
        return out

    def _differentiate(self, work: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that have some; those of weights are where all recordings put them."""
        with torch.enable_grad():
            out = work()
        sources = [part for part in self.inputs if part.requires_grad]
        weights = [part for part in self.shared.weights.values() if part.requires_grad]
        found = torch.autograd.grad(out, [*sources, *weights], self.into_out, allow_unused=True)
        into_weights = found[len(sources) :]
        self.unused = [number for number, gradient in enumerate(into_weights) if gradient is None]
        used = [number for number, gradient in enumerate(into_weights) if gradient is not None]
        with torch.no_grad():
            torch._foreach_copy_(
                [self.shared.into_weights[number] for number in used], [into_weights[number] for number in used]
            )
        return found[: len(sources)]


def record(work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Record work that waits for nothing; gives also what it gives, which replays write again.

    Args:
        work: Done once before, for kernels are compiled and libraries made ready then, which cannot be recorded.
        stream: Where it is recorded.
        pool: Of memory, shared with recordings on the same stream that are not replayed at the same time; None: its
            own.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may copy batches meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return result, graph


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: RecordedCall, n_inputs: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:n_inputs]
        for place, part in zip(recorded.inputs, inputs, strict=True):
            place.detach().copy_(part)
        ctx.offset = recorded.generator.get_offset()
        ctx.recorded = recorded
        ctx.save_for_backward(*inputs)
        recorded.forward.replay()
        return recorded.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_out: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        for place, part in zip(recorded.inputs, ctx.saved_tensors, strict=True):
            place.detach().copy_(part)
        recorded.into_out.copy_(into_out)
        with drawing_from(recorded.generator, ctx.offset):
            recorded.backward.replay()
        found = iter([None if part is None else part.clone() for part in recorded.into_inputs])
        into_inputs = [next(found) if place.requires_grad else None for place in recorded.inputs]
        into_weights = [
            None if number in recorded.unused else part.clone()
            for number, part in enumerate(recorded.shared.into_weights)
        ]
        return None, None, *into_inputs, *into_weights


@contextlib.contextmanager
def drawing_from(generator: torch.Generator, offset: int) -> Iterator[None]:
    """Have replays draw the random numbers of an earlier place, and the generator stand where it was afterwards."""
    now = generator.get_offset()
    generator.set_offset(offset)
    try:
        yield
    finally:
        generator.set_offset(now)
