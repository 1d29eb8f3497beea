"""How a run is asked to stop before its end: by a signal, by a file in its folder, or by the clock."""

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
    """All processes have agreed to stop here; says why."""


@dataclass
class Interruption:
    """Knows whether this process was asked to stop, and brings all processes to one mind about it.

    Each process votes at each step, in a sum over the processes that the step makes anyway. So a signal to one of them
    is enough, and all stop at the same step.

    Attributes:
        stop_file: A file that asks to stop by being there; the first process looks.
        max_minutes: Minutes after the start of the process at which it is to stop.
        on_signal: Called with the name of each signal at its first arrival, in a thread of its own.
        received: Signals received so far.
    """

    stop_file: Path | None = None
    max_minutes: float | None = None
    on_signal: Callable[[str], None] = lambda name: None
    received: set[int] = field(default_factory=set)
    # a signal may come in the middle of anything, of a print too; this queue may be used even then
    _arrivals: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of signals, which then end nothing by themselves, however many come."""
        announcer = threading.Thread(target=self._announce, daemon=True)
        announcer.start()
        try:
            with handling_signals(self._receive):
                yield
        finally:
            self._arrivals.put(None)
            announcer.join()

    def votes(self) -> list[float]:
        """1 for each of the reasons to stop that this process knows of, 0 for the others."""
        # all processes need not see the file at the same time
        is_there = is_first() and self.stop_file is not None and self.stop_file.exists()
        is_late = self.max_minutes is not None and minutes_since_start() >= self.max_minutes
        return [float(known) for known in (*(number in self.received for number in SIGNALS), is_there, is_late)]

    def obey(self, votes: Sequence[float]) -> None:
        """Stop if any process voted for it.

        Args:
            votes: Those of all processes, summed.

        Raises:
            Interrupted: One did.
        """
        for reason, count in zip(REASONS, votes, strict=True):
            if count:
                raise Interrupted(reason)

    def ask(self, device: torch.device | None = None) -> None:
        """Vote and obey, where there is no other sum to join. All processes call it together."""
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
    """Call this for every signal that asks to stop."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def minutes_since_start() -> float:
    """How long this process has been there, its imports included."""
    return (time.time() - psutil.Process().create_time()) / 60


def ignore_signals(_: int) -> None:
    """For a process that makes batches: it ends with the one it makes them for, which stops in its own time."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
