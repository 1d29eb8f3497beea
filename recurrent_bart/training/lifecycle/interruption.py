"""Requests to stop a run early: a signal, a file in the run folder, or a time limit."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from recurrent_bart.distributed import is_first, sum_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REASONS = (*(number.name for number in SIGNALS), "the stop file", "--max_minutes")


class Interrupted(Exception):  # noqa: N818, for it is no error
    """Exception that all ranks raise at the same step when the run was asked to stop. The message names the reason."""


@dataclass
class Interruption:
    """Collector of requests to stop the run. All ranks stop at the same step.

    Each rank votes at each step. Votes are added up in a sum over ranks that the step computes anyway, so a signal to
    one rank is enough.

    Attributes:
        stop_file: Path whose existence asks to stop; only rank 0 checks it.
        max_minutes: Time limit in minutes, counted from the start of the process.
        on_signal: Called once per signal with its name, in a separate thread.
        received: Numbers of the received signals.
    """

    stop_file: Path | None = None
    max_minutes: float | None = None
    on_signal: Callable[[str], None] = lambda name: None
    received: set[int] = field(default_factory=set)
    # SimpleQueue.put is reentrant, so a signal handler may call it at any point, even during a print
    _arrivals: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Collect signals within this block. The signals do not end the process."""
        announcer = threading.Thread(target=self._announce, daemon=True)
        announcer.start()
        try:
            with handling_signals(self._receive):
                yield
        finally:
            self._arrivals.put(None)
            announcer.join()

    def votes(self) -> list[float]:
        """Return one vote for each entry of `REASONS`: 1 if this rank knows this reason to stop, else 0."""
        # on a network file system, ranks may see the file at different times
        is_there = is_first() and self.stop_file is not None and self.stop_file.exists()
        is_late = self.max_minutes is not None and minutes_since_start() >= self.max_minutes
        return [float(known) for known in (*(number in self.received for number in SIGNALS), is_there, is_late)]

    def obey(self, votes: Sequence[float]) -> None:
        """Raise Interrupted if any rank voted to stop. `votes` are sums over all ranks."""
        for reason, count in zip(REASONS, votes, strict=True):
            if count:
                raise Interrupted(reason)

    def ask(self, device: torch.device | None = None) -> None:
        """Sum the votes of all ranks. Raise Interrupted if any rank voted to stop. All ranks must call `ask`."""
        self.obey(sum_over_ranks(*self.votes(), device=device))

    def _receive(self, number: int, _: Any) -> None:
        self.received.add(number)
        self._arrivals.put(number)

    def _announce(self) -> None:
        announced = set()
        while (number := self._arrivals.get()) is not None:
            if number not in announced:
                announced.add(number)
                self.on_signal(signal.Signals(number).name)


@contextlib.contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Set the handler of all signals that ask to stop, within the `with` block."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def minutes_since_start() -> float:
    """Return the minutes since this process started, including its imports."""
    return (time.time() - psutil.Process().create_time()) / 60


def ignore_signals(_: int) -> None:
    """Ignore signals in a data loader worker. The main process stops at a step and then ends its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
