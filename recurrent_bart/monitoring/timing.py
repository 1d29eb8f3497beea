"""Time of each kind of work, measured without waiting for the GPU."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Sum of the seconds of each kind of work, on one device (default: CPU).

    A GPU runs asynchronously, so CUDA events mark the beginning and end of the work. They are read only in `seconds`.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, kind: str, on_host: bool = False) -> Iterator[None]:
        """Add the duration of the block to `kind`; `on_host` measures CPU time even if the device is a GPU."""
        if self.device.type == "cuda" and not on_host:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((kind, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[kind] += time.perf_counter() - started

    def each(self, kind: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and add the time that each takes to arrive to `kind`."""
        iterator = iter(items)
        while True:
            with self.measure(kind):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each kind since the last call, and reset them; synchronises the GPU."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for kind, begin, end in self._events:
            self._seconds[kind] += begin.elapsed_time(end) / 1000
        found, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return found
