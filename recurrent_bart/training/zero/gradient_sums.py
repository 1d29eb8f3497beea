"""Gradients of several backward passes, summed in float32 and reduced over ranks once.

A bfloat16 number has 8 significant bits, so a sum of 256 equal numbers stops growing. Autograd accumulates gradients in
the precision of the weights. Here each pass starts without gradients, and its gradients are added to float32 sums.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from recurrent_bart.training.zero.deepspeed_patches import FLUSHES
from recurrent_bart.training.zero.float32_sums import add_gradients
from recurrent_bart.training.zero.gradient_exchange import exchanging_gradients_in, give_gradient


@contextlib.contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Replace methods of an object within this block."""
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


class StepGradients:
    """Gradients of one optimizer step of a ZeRO engine, over several backward passes.

    DeepSpeed leaves the gradients of the passes in `parameter.grad`. If `grad_accum_dtype` differs from the data type
    of the weights, this class collects them after each pass. It puts the sums back before the reduction.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self.engine, self.optimizer = engine, engine.optimizer
        self.dtype = self.optimizer.gradient_accumulation_dtype
        self.has_sums = self.dtype != self.optimizer.dtype
        self.parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        self.is_dropped = self.is_reduced = False

    def collect(self) -> None:
        """Add the gradients of a backward pass to the sums, and free the gradients."""
        if self.has_sums:
            self.sums = add_gradients(self.sums, [parameter.grad for parameter in self.parameters], self.dtype)
            self._free()

    def drop(self) -> None:
        """Discard the gradients of all passes, because the step is not applied."""
        self.is_dropped, self.sums = True, []
        self._free()

    def reduce(self, flush: Callable[[Any], None], optimizer: Any) -> None:
        """Reduce the sums over ranks with DeepSpeed's `flush`; do nothing after `drop`.

        The sums are exchanged in their data type, or in `communication_data_type` if the configuration names one.
        """
        if self.is_dropped:
            return
        self.collect()
        self.is_reduced = True
        if not self.has_sums:
            flush(optimizer)
            return
        with exchanging_gradients_in(optimizer, self.engine._config.communication_data_type or self.dtype):
            self._put_back()
            flush(optimizer)
            # with some settings, ZeRO-2 keeps the gradients until the update
            self._free()

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collect gradients after each backward pass in this block. Reduce them when DeepSpeed flushes its buckets."""
        engine = self.engine
        backward = engine.backward

        def backward_and_collect(*inputs: Any, **settings: Any) -> Any:
            result = backward(*inputs, **settings)
            self.collect()
            return result

        flushes = {name: functools.partial(self.reduce, getattr(engine, name)) for name in FLUSHES}
        with replaced(engine, backward=backward_and_collect, **flushes):
            yield

    def _put_back(self) -> None:
        sums, self.sums = self.sums, []
        for parameter, total in zip(self.parameters, sums, strict=True):
            if total is not None:
                give_gradient(self.optimizer, parameter, total)

    def _free(self) -> None:
        for parameter in self.parameters:
            # `grad_accum` is an attribute that DeepSpeed's ZeRO-1 and ZeRO-2 set
            parameter.grad = parameter.grad_accum = None
