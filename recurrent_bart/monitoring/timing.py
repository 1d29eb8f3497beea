"""Stopwatch for kinds of work, for example forward passes. Measuring does not wait for the GPU."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Stopwatch that adds up the seconds of each kind of work on one device (default: CPU).

    A GPU runs asynchronously, so CUDA events mark the beginning and end of the work. Only `seconds` reads the events.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, kind: str, on_host: bool = False) -> Iterator[None]:
        """Add the duration of the `with` block to `kind`. `on_host` measures CPU time even if the device is a GPU."""
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
        """Yield the items. Add the time spent waiting for each item to `kind`."""
        iterator = iter(items)
        while True:
            with self.measure(kind):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Wait for the GPU, return the seconds of each kind since the last call, and reset the sums to 0."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for kind, begin, end in self._events:
            self._seconds[kind] += begin.elapsed_time(end) / 1000
        found, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return found
