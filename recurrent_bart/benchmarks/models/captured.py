"""Training steps and reading of other models as one CUDA graph, for batches of one shape.

A model that launches many small kernels waits for the CPU. A CUDA graph replays all kernels by one launch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import masking_utils

from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkModel
from recurrent_bart.data.batches import Batch
from recurrent_bart.execution.cuda_graphs import HeldFunction, capture, warm_up
from recurrent_bart.execution.graph_guards import device_guard


@contextlib.contextmanager
def masks_left_out() -> Iterator[None]:
    """Leave out masks that hide nothing, as without a capture: transformers before 5.18 builds them during a capture.

    Attention with a mask is slower, and the models get no padding here.
    """
    is_tracing = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = is_tracing


class CapturedFunction:
    """CUDA graph of a function of a batch.

    A call copies `batch` to the buffers that the graph reads, and replays the graph. The next call overwrites the
    returned tensors.
    """

    def __init__(self, function: Callable[[Batch], Sequence[Any]], batch: Batch, device: torch.device):
        self.batch = batch
        ids, labels = (part.to(device, copy=True) for part in (batch.input_ids, batch.labels))
        self._inputs = replace(batch, input_ids=ids, labels=labels)
        with device_guard(device), masks_left_out():
            stream = torch.cuda.Stream()
            warm_up([self._run(function)], stream)
            self._outputs, self._graph = capture(self._run(function), stream)

    def __call__(self) -> Sequence[Any]:
        """Return the function's result for `batch`."""
        self._inputs.input_ids.copy_(self.batch.input_ids)
        self._inputs.labels.copy_(self.batch.labels)
        self._graph.replay()
        return self._outputs

    def _run(self, function: Callable[[Batch], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        return lambda: function(self._inputs)


class CapturedStep:
    """Training step whose forward and backward pass are one CUDA graph.

    The optimizer step is not captured. Gradients stay allocated, and each step overwrites the gradients.
    """

    def __init__(self, subject: BenchmarkModel, batch: Batch, with_optimizer: bool):
        self.parameters = [it for it in subject.model.parameters() if it.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True) if with_optimizer else None

        def passes(batch: Batch) -> list[Tensor | None]:
            # new leaves on the memory of the parameters: a leaf that the default stream has used would make that stream
            # wait for the capture
            leaves = {name: it.detach().requires_grad_() for name, it in subject.model.named_parameters()}
            held = {f"module.{name}": leaf for name, leaf in leaves.items()}
            (loss,) = functional_call(HeldFunction(subject.model, lambda: [*subject.losses(batch)]), held, ())
            sources = [leaves[name] for name, it in subject.model.named_parameters() if it.requires_grad]
            return [loss.detach(), *torch.autograd.grad(loss, sources, allow_unused=True)]

        self.passes = CapturedFunction(passes, batch, batch_device(subject))

    def __call__(self) -> Any:
        """Run one training step, and return the loss."""
        loss, *gradients = self.passes()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.optimizer is not None:
            self.optimizer.step()
        return loss


def captured_reading(subject: BenchmarkModel, batch: Batch) -> CapturedFunction:
    """Return a function that encodes a batch by one CUDA graph."""
    return CapturedFunction(torch.no_grad()(lambda batch: [subject.encode(batch)]), batch, batch_device(subject))


def batch_device(subject: BenchmarkModel) -> torch.device:
    """Return the device of a model's parameters."""
    return next(subject.model.parameters()).device
