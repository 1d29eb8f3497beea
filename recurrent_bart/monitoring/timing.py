"""How long kinds of work take, without waiting for a GPU to be done with them."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Adds up the seconds of each kind of work.

    On a GPU work is only queued, so that its end is marked by events in the queue, which are read when the seconds are
    asked for; nothing is waited for before.

    Args:
        device: Where the work is done; a processor if not given.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, kind: str, on_host: bool = False) -> Iterator[None]:
        """Count what is done inside.

        Args:
            kind: What it is.
            on_host: It is the processor's work, whatever the device.
        """
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
        """The items; counts how long each takes to come."""
        iterator = iter(items)
        while True:
            with self.measure(kind):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind since they were last asked for; waits for the work that is queued."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for kind, begin, end in self._events:
            self._seconds[kind] += begin.elapsed_time(end) / 1000
        found, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return found
