"""Counters of the service in Prometheus' text format. No text of a user is a label."""

import threading
from collections import Counter, defaultdict

# type and meaning of each metric
METRICS = {
    "requests_total": ("counter", "requests answered since the start, by route and status; 499: the client went away"),
    "request_seconds": ("summary", "seconds from the request to the end of its answer, by route"),
    "summaries_total": ("counter", "summaries written since the start"),
    "summary_source_tokens_total": (
        "counter",
        "tokens of the summarised texts; a text counts for each summary",
    ),
    "sessions": ("gauge", "sessions on disk"),
    "pending": ("gauge", "requests that wait for the model or are being answered"),
}


class Metrics:
    """Counters by name and labels; all threads may add."""

    def __init__(self) -> None:
        self._values: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        """Add to a counter."""
        inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
        with self._lock:
            self._values[name, f"{{{inner}}}" if inner else ""] += amount  # type: ignore[assignment]

    def text(self, **gauges: float) -> str:
        """Return all counters, and `gauges`, as lines."""
        with self._lock:
            values = {**self._values, **{(name, ""): value for name, value in gauges.items()}}
        lines = defaultdict(list)
        for (name, labels), value in sorted(values.items()):
            metric = name.removesuffix("_sum").removesuffix("_count")
            lines[metric].append(f"recurrent_bart_{name}{labels} {value}")
        parts = []
        for metric, rows in lines.items():
            kind, meaning = METRICS[metric]
            parts += [f"# HELP recurrent_bart_{metric} {meaning}", f"# TYPE recurrent_bart_{metric} {kind}", *rows]
        return "\n".join(parts) + "\n"
