"""Notices that a run stands still."""

import threading
from collections.abc import Callable


class StallWatch:
    """Says once that nothing has happened for long, and again only if something has happened since.

    Args:
        seconds: What is long.
        on_stall: Told; by a thread of its own, for the one that trains may be what waits.
    """

    def __init__(self, seconds: float, on_stall: Callable[[], None]):
        self.seconds, self.on_stall = seconds, on_stall
        self._beaten, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StallWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.beat()
        self._thread.join()

    def beat(self) -> None:
        """Something has happened."""
        self._beaten.set()

    def _watch(self) -> None:
        while not self._is_over:
            if not self._beaten.wait(self.seconds):
                self.on_stall()
                self._beaten.wait()
            self._beaten.clear()
