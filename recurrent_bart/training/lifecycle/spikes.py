"""Detection of loss spikes."""

import statistics
from collections import deque
from collections.abc import Mapping

# number of log lines over which the median is taken: fewest and most
FEWEST, MOST = 8, 64
# a spike exceeds both FACTOR times the median and the median plus MARGIN nats; the margin matters near zero loss
FACTOR, MARGIN = 2.0, 0.5


class SpikeWatch:
    """Comparison of each log line's loss with the median of earlier lines.

    The comparison uses logged losses, which are equal on every rank, so it costs a step nothing. No step is skipped:
    all ranks would have to agree on the loss before each update, and `--max_grad_norm` already bounds the effect of one
    batch.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=MOST)
        self.n_in_row = 0

    def warning(self, record: Mapping[str, float]) -> str | None:
        """Return a warning if the loss of a log line is a spike, else None."""
        if "loss" not in record:
            return None
        loss = record["loss"]
        median = statistics.median(self.losses) if len(self.losses) >= FEWEST else loss
        self.losses.append(loss)
        if loss <= max(FACTOR * median, median + MARGIN):
            self.n_in_row = 0
            return None
        self.n_in_row += 1
        return f"step {record['step']}: the loss is {loss:.4g}, the median of earlier losses is {median:.4g}"
