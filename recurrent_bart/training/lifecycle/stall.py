"""Detection of a run that makes no progress."""

import threading
from collections.abc import Callable


class StallWatch:
    """Watchdog that reports a missing heartbeat (call of `beat`) once, and again only after a new heartbeat.

    Args:
        seconds: Longest time without a heartbeat.
        on_stall: Called in a separate thread, because the training thread may be the stalled one.
    """

    def __init__(self, seconds: float, on_stall: Callable[[], None]):
        self.seconds, self.on_stall = seconds, on_stall
        self._heartbeat, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.beat()
        self._thread.join()

    def beat(self) -> None:
        """Report progress, which restarts the waiting time."""
        self._heartbeat.set()

    def _watch(self) -> None:
        while not self._is_over:
            if not self._heartbeat.wait(self.seconds):
                self.on_stall()
                self._heartbeat.wait()
            self._heartbeat.clear()
