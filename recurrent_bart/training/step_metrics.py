"""Metrics of a rank since the last log line."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from recurrent_bart.data.batches import Batch
from recurrent_bart.monitoring.rank_metrics import RankMetrics

# counters that a checkpoint saves and a resumed run continues
COUNTED = (
    "loss",
    "n_targets",
    "n_tokens",
    "n_documents",
    "n_segments",
    "n_flops",
    "n_steps",
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
)


@dataclass
class StepMetrics(RankMetrics):
    """Metrics of this rank over `n_steps` optimizer steps.

    `started` is a time in seconds by `time.perf_counter`; `learning_rate` belongs to the last step.
    """

    n_steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    learning_rate: float = 0.0

    def add(self, batch: Batch, n_flops: float) -> None:
        """Count a batch and the useful floating-point operations of its passes."""
        self.n_targets += batch.n_targets()
        self.n_tokens += batch.n_tokens()
        self.n_documents += len(batch.labels)
        self.n_segments += int(batch.attention_mask.any(dim=-1).sum())
        self.n_flops += n_flops

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds that each kind of work took."""
        for kind, value in seconds.items():
            setattr(self, f"{kind}_seconds", getattr(self, f"{kind}_seconds") + value)

    def as_dict(self) -> dict[str, float]:
        """Return the counters that a checkpoint saves."""
        counters = {name: float(getattr(self, name)) for name in COUNTED}
        return {**counters, "seconds": time.perf_counter() - self.started}

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "StepMetrics":
        """Build metrics that continue from a checkpoint's counters. Missing counters start at zero."""
        restored = cls(started=time.perf_counter() - metrics.get("seconds", 0.0))
        for name in COUNTED:
            setattr(restored, name, metrics.get(name, 0.0))
        restored.n_steps = int(restored.n_steps)
        return restored
