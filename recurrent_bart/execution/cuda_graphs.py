"""A function of tensors recorded as CUDA graphs, with its backward pass.

For work whose kernels take less time than launching them one by one. What the forward pass keeps for the backward pass
stays where it was recorded until anything else of the module is replayed; a call that is differentiated later than that
is computed again, so that memory is that of one call, whatever the number of calls and of shapes.
"""

import contextlib
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from recurrent_bart.execution.graph_guards import device_guard, graph_user
from recurrent_bart.execution.module_settings import backend_settings, has_hooks, settings_of
from recurrent_bart.recurrence.segmentation import is_sharded

# shapes whose recordings are kept of a module, the last used ones
MOST_SHAPES = 32
_recorded: weakref.WeakKeyDictionary[nn.Module, "GraphedModule"] = weakref.WeakKeyDictionary()


def can_capture(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return True if a training step may replay a module: its weights are on one GPU and its parts have no hooks."""
    parameters = list(module.parameters())
    return (
        torch.is_grad_enabled()
        and any(part.requires_grad for part in (*inputs, *parameters))
        and inputs[0].is_cuda
        and all(part.device == inputs[0].device for part in (*inputs, *parameters))
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
        # ZeRO-3 may not have gathered them
        and all(part.numel() == getattr(part, "ds_numel", part.numel()) for part in parameters)
        and not any(has_hooks(part) for part in module.modules() if part is not module)
    )


def call_graphed(
    module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor], *settings: Hashable
) -> Tensor:
    """Return what a function gives for these inputs, by replaying a CUDA graph.

    Everything that a graph depends on is in its key: shapes and types of the inputs, `settings`, the settings of the
    module and those of PyTorch. A call with a new key captures a new graph.

    Args:
        module: Module whose parameters the function uses.
        function: Gives one tensor from the inputs and the module's parameters.
        inputs: Tensors on the module's device.
        settings: Constants of the function that are not the module's.

    Raises:
        ValueError: Another thread uses the module's graphs.
    """
    with device_guard(inputs[0].device), graph_user(module).whole_pass():
        recorded = _recorded.get(module)
        if recorded is None or not recorded.is_of(module):
            recorded = _recorded[module] = GraphedModule(module)
        recorded.load(module)
        shapes = tuple((part.shape, part.dtype, part.requires_grad) for part in inputs)
        key = shapes, settings, *settings_of(module), backend_settings()
        call = recorded.call(key, functools.partial(GraphedCall, module, function, inputs))
        trained = (part for part in module.parameters() if part.requires_grad)
        return _Replayed.apply(call, len(inputs), *inputs, *trained)


class GraphedModule:
    """Recordings of a module, which work in the same memory, one after the other.

    Attributes:
        weights: The module's, the same numbers, but leaves of graphs that nobody else has made, on another stream. They
            lie where the module's lie; ZeRO-3 gathers these elsewhere each time, so there are copies of them.
        weight_gradients: Gradients of those that have some, of the last replay.
        user: Guard of that memory.
        undifferentiated: What was computed last, with its autograd graph, from which the backward pass is recorded.
        n_overwrites: So many times was the memory written over that a forward pass leaves to its backward pass.
    """

    def __init__(self, module: nn.Module):
        self.is_copied, self.user = is_sharded(module), graph_user(module)
        with torch.no_grad():
            weights = {name: it.clone() if self.is_copied else it.detach() for name, it in module.named_parameters()}
        self.weights = {name: weights[name].requires_grad_(it.requires_grad) for name, it in module.named_parameters()}
        with torch.no_grad():
            self.weight_gradients = [torch.zeros_like(part) for part in self.weights.values() if part.requires_grad]
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.calls: dict[Hashable, GraphedCall] = {}
        self.undifferentiated: Tensor | None = None
        self.n_overwrites = 0
        self._places: dict[Hashable, Tensor] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Return True if the module's parameters still are where they were, or have the shapes of the copies."""

        def place(part: Tensor) -> tuple:
            address = part.shape if self.is_copied else part.data_ptr()
            return address, part.dtype, part.device, part.requires_grad

        return [*map(place, module.parameters())] == [*map(place, self.weights.values())]

    @torch.no_grad()
    def load(self, module: nn.Module) -> None:
        """Take the module's parameters, if these are copies."""
        if self.is_copied:
            torch._foreach_copy_(list(self.weights.values()), list(module.parameters()))

    def call(self, key: Hashable, build: Callable[["GraphedModule"], "GraphedCall"]) -> "GraphedCall":
        """The recording of a shape; the oldest is forgotten where there are too many."""
        self.calls[key] = self.calls.pop(key) if key in self.calls else build(self)
        if len(self.calls) > MOST_SHAPES:
            del self.calls[next(iter(self.calls))]
        return self.calls[key]

    def place(self, name: str, like: Tensor) -> Tensor:
        """A tensor of such a shape that recordings read or write, where those of other shapes have theirs."""
        key = name, like.dtype
        if key not in self._places or self._places[key].numel() < like.numel():
            self._places[key] = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        return self._places[key][: like.numel()].view(like.shape)


class GraphedCall:
    """Graphs of a function and of its backward pass, and the tensors that they read and write."""

    def __init__(
        self, module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor], shared: GraphedModule
    ):
        self.shared = shared
        self.inputs = [
            shared.place(f"input {number}", part).requires_grad_(part.requires_grad)
            for number, part in enumerate(inputs)
        ]
        input_gradients = [
            shared.place(f"into input {number}", part) for number, part in enumerate(inputs) if part.requires_grad
        ]
        self.out = self.output_gradient = torch.empty(0)
        # of inputs and weights that require one; and whether they have one
        self.gradients, self.is_used = [*input_gradients, *shared.weight_gradients], [True]
        weights = {f"module.{name}": weight for name, weight in shared.weights.items()}
        compute = functools.partial(self._compute, functools.partial(functional_call, _Held(module, function), weights))
        self.generator = torch.cuda.default_generators[inputs[0].device.index]
        offset = self.generator.get_offset()
        self._load(inputs)
        warm_up([compute, self._differentiate], shared.stream)
        _, self._forward = capture(compute, shared.stream, shared.pool)
        # with the autograd graph it gives back to the pool what the forward pass keeps: other recordings take it
        _, self._backward = capture(self._differentiate, shared.stream, shared.pool)
        self.generator.set_offset(offset)

    @torch.enable_grad()
    def _compute(self, function: Callable[..., Tensor]) -> None:
        out = self.shared.undifferentiated = function(tuple(self.inputs))
        if not self.out.numel():
            self.out, self.output_gradient = (self.shared.place(name, out) for name in ("out", "into out"))
        with torch.no_grad():
            self.out.copy_(out)

    def _differentiate(self) -> None:
        out, self.shared.undifferentiated = self.shared.undifferentiated, None
        assert out is not None
        sources = [part for part in (*self.inputs, *self.shared.weights.values()) if part.requires_grad]
        found = torch.autograd.grad(out, sources, self.output_gradient, allow_unused=True)
        self.is_used = [part is not None for part in found]
        with torch.no_grad():
            torch._foreach_copy_(
                list(itertools.compress(self.gradients, self.is_used)), list(itertools.compress(found, self.is_used))
            )

    def _load(self, inputs: Sequence[Tensor]) -> None:
        self.shared.n_overwrites += 1
        for place, part in zip(self.inputs, inputs, strict=True):
            place.detach().copy_(part)

    def forward(self, inputs: Sequence[Tensor]) -> int:
        """Compute `out`; gives `shared.n_overwrites`: while it stays that, the backward pass finds what it needs."""
        self._load(inputs)
        self._forward.replay()
        return self.shared.n_overwrites

    def backward(self, output_gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs and weights that require some, directly after `forward`."""
        self.shared.n_overwrites += 1
        self.output_gradient.copy_(output_gradient)
        self._backward.replay()
        used = list(itertools.compress(self.gradients, self.is_used))
        # some hundred weights in few kernels
        given = [torch.empty_like(part) for part in used]
        torch._foreach_copy_(given, used)
        rest = iter(given)
        return [next(rest) if is_used else None for is_used in self.is_used]


class _Held(nn.Module):
    """A function and the module whose parameters it uses, which can be exchanged for it."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.module = module
        # no part of it, not even if it is the module itself
        self.function = functools.partial(function)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def record(work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Any, torch.cuda.CUDAGraph]:
    """As `capture`, of work that is done once before."""
    warm_up([work], stream)
    return capture(work, stream, pool)


def warm_up(works: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> None:
    """Do works before they are recorded: kernels are compiled and libraries made ready, which cannot be recorded."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Record work that waits for nothing; gives also what it gives, which replays write again.

    Args:
        work: Not done now, only recorded.
        stream: Where it is recorded.
        pool: Of memory, shared with recordings on the same stream that are not replayed at the same time; None: its
            own.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads may copy batches meanwhile
    how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    with garbage_collection_paused(), torch.cuda.graph(graph, **how):
        result = work()
    return result, graph


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Graphs of models that are no longer there, freed in the middle of a recording, would make an end of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorded: GraphedCall, n_inputs: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:n_inputs]
        ctx.recorded, ctx.offset = recorded, recorded.generator.get_offset()
        ctx.save_for_backward(*inputs)
        ctx.n_overwrites = recorded.forward(inputs)
        return recorded.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        with recorded.shared.user.whole_pass():
            # another call was made since, or this one's backward pass: both write over what it kept
            if ctx.n_overwrites != recorded.shared.n_overwrites:
                with rng_offset(recorded.generator, ctx.offset):
                    recorded.forward(ctx.saved_tensors)
            gradients = iter(recorded.backward(output_gradient))
        input_gradients = [next(gradients) if place.requires_grad else None for place in recorded.inputs]
        return None, None, *input_gradients, *gradients


@contextlib.contextmanager
def rng_offset(generator: torch.Generator, offset: int) -> Iterator[None]:
    """Have replays draw the random numbers of an earlier place, and the generator stand where it was afterwards."""
    now = generator.get_offset()
    generator.set_offset(offset)
    try:
        yield
    finally:
        generator.set_offset(now)
