"""Counters of the service in Prometheus' text format. No text of a user is a label."""

import threading
from collections import Counter


class Metrics:
    """Counters by name and labels; all threads may add."""

    def __init__(self) -> None:
        self._values: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        """Add to a counter."""
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        with self._lock:
            self._values[f"recurrent_bart_{name}" + (f"{{{inner}}}" if inner else "")] += amount  # type: ignore[assignment]

    def text(self, **gauges: float) -> str:
        """Return all counters, and `gauges`, as lines."""
        with self._lock:
            lines = [f"{name} {value}" for name, value in sorted(self._values.items())]
        return "\n".join([*lines, *(f"recurrent_bart_{name} {value}" for name, value in gauges.items())]) + "\n"
