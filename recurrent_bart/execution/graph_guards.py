"""Guards for CUDA graphs: capture on the right GPU, and only one pass at a time in the memory of the graphs."""

import contextlib
import itertools
import threading
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Step = TypeVar("Step")


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which PyTorch's streams, captures and Triton kernels use the given GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class GraphStore:
    """CUDA graphs of a module, an attribute of the module; copies of the module and files begin without graphs."""

    def __init__(self) -> None:
        self.user = GraphUser()
        self.graphs: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple:
        return GraphStore, ()


def graph_store(module: nn.Module) -> GraphStore:
    """Return the module's CUDA graphs; the first call makes an empty store."""
    return vars(module).setdefault("graph_store", GraphStore())


class GraphUser:
    """Guard for the memory that all CUDA graphs of a module share; it allows one pass at a time.

    A second pass at the same time raises an error, because that pass would overwrite the first pass's values.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # the pass that began last
        self._owner: object = None

    def whole_pass(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that reserves the graphs for one whole pass.

        Raises:
            ValueError: Another thread has reserved the graphs.
        """
        return self._part_of(object(), is_first=True)

    def steps_of_pass(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps of a pass, and reserve the graphs while each step is computed.

        Raises:
            ValueError: Another thread has reserved the graphs, or another pass has begun since the last step.
        """
        owner = object()
        for number in itertools.count():
            with self._part_of(owner, is_first=number == 0):
                found = list(itertools.islice(steps, 1))
            if not found:
                return
            yield found[0]

    @contextlib.contextmanager
    def _part_of(self, owner: object, is_first: bool) -> Iterator[None]:
        is_free = self._lock.acquire(blocking=False)
        try:
            if not is_free or not (is_first or self._owner is owner):
                raise ValueError(
                    "two threads run one model with schedule='auto' at the same time, but its CUDA graphs share their "
                    "memory: run one pass after the other, give each thread a copy of the model, or set "
                    "config.schedule to 'wavefront' or 'sequential'"
                )
            self._owner = owner
            yield
        finally:
            if is_free:
                self._lock.release()
