"""Notices a loss that is far above what it was."""

import statistics
from collections import deque
from collections.abc import Mapping

# lines of the log: fewer tell nothing yet, more are forgotten
FEWEST, MOST = 8, 64
# times the median, and nats above it: near zero, a multiple of little is still little
FACTOR, MARGIN = 2.0, 0.5


class SpikeWatch:
    """Compares the loss of each line of the log with the median of those before.

    It reads what is there already, the same on every process, and so costs a step nothing. It does not skip a step:
    for that all processes would have to agree on the loss of each before its gradient is applied, and what one batch
    can do is bounded by `--max_grad_norm` already.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=MOST)
        self.n_in_row = 0

    def warning(self, record: Mapping[str, float]) -> str | None:
        """What to say of a line of the log, if its loss is far above."""
        if "loss" not in record:
            return None
        loss = record["loss"]
        median = statistics.median(self.losses) if len(self.losses) >= FEWEST else loss
        self.losses.append(loss)
        if loss <= max(FACTOR * median, median + MARGIN):
            self.n_in_row = 0
            return None
        self.n_in_row += 1
        return f"step {record['step']}: the loss is {loss:.4g}, its median before was {median:.4g}"
