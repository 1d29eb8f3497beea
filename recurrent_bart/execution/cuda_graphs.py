"""CUDA graphs of a function's forward and backward pass, for work that is limited by kernel launches on the CPU.

Activations stay in the graph's memory until another graph of the same module is replayed. A later backward pass
recomputes the activations. So any number of calls and shapes needs only the memory of one call.
"""

import contextlib
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from recurrent_bart.execution.graph_guards import device_guard, graph_store
from recurrent_bart.execution.module_settings import backend_settings, has_hooks, settings_of
from recurrent_bart.recurrence.segmentation import is_sharded

# CUDA allows one capture per process at a time
_one_capture = threading.Lock()
# number of shapes per module whose graphs are kept, by last use
MOST_SHAPES = 32


def can_capture(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return True if a training step may run a module by CUDA graphs: on one GPU, and without hooks on submodules."""
    # replicas of DataParallel have no parameters, only copies that change with each call
    parameters = list(module.parameters())
    return (
        bool(parameters)
        and torch.is_grad_enabled()
        and any(part.requires_grad for part in (*inputs, *parameters))
        and inputs[0].is_cuda
        and all(part.device == inputs[0].device for part in (*inputs, *parameters))
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
        # ZeRO-3 may not have gathered the parameters
        and all(part.numel() == getattr(part, "ds_numel", part.numel()) for part in parameters)
        and not any(has_hooks(part) for part in module.modules() if part is not module)
    )


def call_graphed(
    module: nn.Module, function: Callable[..., Tensor], inputs: Sequence[Tensor], *settings: Hashable
) -> Tensor:
    """Return `function(*inputs)`, computed by replaying a CUDA graph.

    The key of a graph holds everything that the graph depends on: shapes and dtypes of the inputs, `settings`, the
    module's settings and PyTorch's settings. A call with a new key captures a new graph.

    Args:
        module: Module whose parameters the function uses.
        function: Returns one tensor from the inputs and the module's parameters.
        inputs: Tensors on the module's device.
        settings: Constants that the function uses and that are not attributes of the module.

    Raises:
        ValueError: Another thread uses the module's graphs.
    """
    store = graph_store(module)
    with device_guard(inputs[0].device), store.user.whole_pass():
        graphed = store.graphs.get(GraphedModule)
        if graphed is None or not graphed.is_of(module):
            graphed = store.graphs[GraphedModule] = GraphedModule(module)
        graphed.load(module)
        shapes = tuple((part.shape, part.dtype, part.requires_grad) for part in inputs)
        key = shapes, settings, *settings_of(module), backend_settings()
        call = graphed.call(key, functools.partial(GraphedCall, module, function, inputs))
        trained = (part for part in module.parameters() if part.requires_grad)
        return _Replayed.apply(call, len(inputs), *inputs, *trained)


class GraphedModule:
    """CUDA graphs of a module, which share memory and run one at a time."""

    def __init__(self, module: nn.Module):
        self.is_copied, self.user = is_sharded(module), graph_store(module).user
        with torch.no_grad():
            weights = {name: it.clone() if self.is_copied else it.detach() for name, it in module.named_parameters()}
        # autograd leaves that share the module's parameter memory; copies under ZeRO-3, which gathers parameters at
        # other addresses each time
        self.weights = {name: weights[name].requires_grad_(it.requires_grad) for name, it in module.named_parameters()}
        with torch.no_grad():
            # gradients of the trainable weights after the last replay
            self.weight_gradients = [torch.zeros_like(part) for part in self.weights.values() if part.requires_grad]
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.calls: dict[Hashable, GraphedCall] = {}
        # output of the last forward pass, whose autograd graph the backward capture needs
        self.undifferentiated: Tensor | None = None
        # number of times saved activations were overwritten
        self.n_overwrites = 0
        self._places: dict[Hashable, Tensor] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Return True if the parameters have the addresses of `weights`; if these are copies, the same shapes."""

        def place(part: Tensor) -> tuple:
            address = part.shape if self.is_copied else part.data_ptr()
            return address, part.dtype, part.device, part.requires_grad

        return [*map(place, module.parameters())] == [*map(place, self.weights.values())]

    @torch.no_grad()
    def load(self, module: nn.Module) -> None:
        """Copy the module's parameters if the weights are copies."""
        if self.is_copied:
            torch._foreach_copy_(list(self.weights.values()), list(module.parameters()))

    def call(self, key: Hashable, build: Callable[["GraphedModule"], "GraphedCall"]) -> "GraphedCall":
        """Return the graphs for a key, built if they are missing; keep only the last `MOST_SHAPES` keys used."""
        self.calls[key] = self.calls.pop(key) if key in self.calls else build(self)
        if len(self.calls) > MOST_SHAPES:
            del self.calls[next(iter(self.calls))]
        return self.calls[key]

    def place(self, name: str, like: Tensor) -> Tensor:
        """Return a buffer of this shape, shared by the graphs of all shapes."""
        key = name, like.dtype
        if key not in self._places or self._places[key].numel() < like.numel():
            self._places[key] = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        return self._places[key][: like.numel()].view(like.shape)


class GraphedCall:
    """Graphs of a function's forward and backward pass, and their input and output buffers."""

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
        # gradient buffers of inputs and weights that require a gradient, and True for each one that gets a gradient
        self.gradients, self.is_used = [*input_gradients, *shared.weight_gradients], [True]
        weights = {f"module.{name}": weight for name, weight in shared.weights.items()}
        compute = functools.partial(
            self._compute, functools.partial(functional_call, HeldFunction(module, function), weights)
        )
        self.generator = torch.cuda.default_generators[inputs[0].device.index]
        self._load(inputs)
        with rng_offset(self.generator, self.generator.get_offset()):
            warm_up([compute, self._differentiate], shared.stream)
            _, self._forward = capture(compute, shared.stream, shared.pool)
            # freeing the autograd graph returns its activations to the pool, where other captures reuse the memory
            _, self._backward = capture(self._differentiate, shared.stream, shared.pool)

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
        """Run the forward pass into `out`. Return `shared.n_overwrites`: if it changes, the activations are lost."""
        self._load(inputs)
        self._forward.replay()
        return self.shared.n_overwrites

    def backward(self, output_gradient: Tensor) -> list[Tensor | None]:
        """Return gradients of the inputs and weights that require one; call it directly after `forward`."""
        self.shared.n_overwrites += 1
        self.output_gradient.copy_(output_gradient)
        self._backward.replay()
        used = list(itertools.compress(self.gradients, self.is_used))
        # one fused copy instead of hundreds of kernel launches
        given = [torch.empty_like(part) for part in used]
        torch._foreach_copy_(given, used)
        rest = iter(given)
        return [next(rest) if is_used else None for is_used in self.is_used]


class HeldFunction(nn.Module):
    """Module that holds a function and the module whose parameters the function uses, for `functional_call`."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.module = module
        # wrapped, so that it does not become a submodule if it is the module itself
        self.function = functools.partial(function)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the function's result."""
        return self.function(*inputs)


def warm_up_and_capture(
    work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Run the work once as a warm-up, and then capture it; see `capture`."""
    warm_up([work], stream)
    return capture(work, stream, pool)


def warm_up(works: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> None:
    """Call each function before its capture: kernel compilation and library initialization cannot be captured."""
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for work in works:
                work()
    finally:
        torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[Any, torch.cuda.CUDAGraph]:
    """Capture the function `work` as a CUDA graph without running it. Return its result and the graph.

    Each replay overwrites the result. `work` must not synchronize. Graphs on the same stream may share the memory pool
    `pool` if they are not replayed at the same time; None means a new pool. A capture that fails raises a RuntimeError,
    and leaves the current stream as it was.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # other threads may copy batches during the capture
    how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    with _one_capture, garbage_collection_paused():
        # PyTorch frees the workspaces of a stream's matrix products once any graph of the stream is deleted, so a
        # graph must hold its own workspace, in its pool
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, **how):
                result = work()
        except BaseException:
            # PyTorch does not leave the stream of a capture that cannot end
            torch.cuda.set_stream(before)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return result, graph


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection: freeing the graphs of a deleted model during a capture would abort the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: GraphedCall, n_inputs: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[:n_inputs]
        ctx.call, ctx.offset = call, call.generator.get_offset()
        ctx.save_for_backward(*inputs)
        ctx.n_overwrites = call.forward(inputs)
        return call.out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        with call.shared.user.whole_pass():
            # another call, or this call's own backward pass, has overwritten the activations
            if ctx.n_overwrites != call.shared.n_overwrites:
                with rng_offset(call.generator, ctx.offset):
                    call.forward(ctx.saved_tensors)
            gradients = iter(call.backward(output_gradient))
        input_gradients = [next(gradients) if place.requires_grad else None for place in call.inputs]
        return None, None, *input_gradients, *gradients


@contextlib.contextmanager
def rng_offset(generator: torch.Generator, offset: int) -> Iterator[None]:
    """Set the generator's offset for replays, and restore it afterwards."""
    now = generator.get_offset()
    generator.set_offset(offset)
    try:
        yield
    finally:
        generator.set_offset(now)
