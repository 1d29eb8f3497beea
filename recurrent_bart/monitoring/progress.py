"""Terminal output of a run: progress bar, metrics and messages."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from recurrent_bart.distributed import is_first

# Waiting for data is shown if it takes at least this share of a step's time.
LEAST_WAITING = 0.05
# Text between two metrics on a line.
SEPARATOR = "  "


class RunProgress(Progress):
    """Progress bar with step and time left. Metrics follow on as many lines as the terminal's width needs."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, then the lines of metrics."""
        yield from super().get_renderables()
        for task in self.tasks:
            for line in fill_lines(task.fields["metrics"], self.console.width):
                yield Text(line, no_wrap=True, overflow="ellipsis")


class ProgressDisplay:
    """Terminal display of progress, metrics and time left. Only rank 0 prints.

    A terminal shows a progress bar. With `is_plain` or without a terminal, the display prints plain lines.
    """

    def __init__(self, first_step: int, max_steps: int, console: Console | None = None, is_plain: bool = False):
        self.console = console or Console()
        self.console.quiet = not is_first()
        self.bar = RunProgress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            # None: the bar fills the rest of the line.
            BarColumn(bar_width=None),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.console.quiet or is_plain or not self.console.is_terminal,
            # Estimate the time left from the last hour, because a step may take minutes.
            speed_estimate_period=3600,
        )
        self.task = self.bar.add_task("train", total=max_steps, completed=first_step, metrics=[])
        self.max_steps = max_steps
        self.metrics: list[str] = []
        self.evaluation: list[str] = []

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def step(self, step: int) -> None:
        """Advance the bar to `step` optimizer steps."""
        self.bar.update(self.task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """Show the metrics in `record`, which is one log line, and the last validation loss."""
        if "validation_loss" in record:
            self.evaluation = [f"validation {record['validation_loss']:.3f}"]
        if "loss" in record:
            self.metrics = list(_metrics(record))
        metrics = [*self.metrics, *self.evaluation]
        self.bar.update(self.task, metrics=metrics)
        if self.bar.disable and "loss" in record:
            left = f"left {clock(record['seconds_left'])}"
            self.say(SEPARATOR.join([f"step {record['step']}/{self.max_steps}", *metrics, left]))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(text, self.console)


def fill_lines(metrics: Sequence[str], width: int) -> list[str]:
    """Join the metrics into as few lines of at most `width` characters as possible, without breaking a metric."""
    lines: list[str] = []
    for metric in metrics:
        if lines and len(lines[-1] + SEPARATOR + metric) <= width:
            lines[-1] += SEPARATOR + metric
        else:
            lines.append(metric)
    return lines


def _metrics(record: dict[str, Any]) -> Iterator[str]:
    yield f"loss {record['loss']:.3f}"
    yield f"{record['tokens_per_second']:,.0f} tokens/s"
    if "model_flops_share" in record:
        yield f"{100 * record['model_flops_share']:.0f} % of peak"
    waiting = record.get("data_seconds", 0.0) / record.get("step_seconds", 1.0)
    if waiting >= LEAST_WAITING:
        yield f"{100 * waiting:.0f} % waiting for data"
    if "memory_allocated_bytes" in record:
        yield f"{record['memory_allocated_bytes'] / 2**30:.1f} GiB"
    yield f"lr {record['learning_rate']:.1e}"


def say(text: str, console: Console | None = None) -> None:
    """Print a line without markup, on rank 0 only."""
    if is_first():
        console = console or Console()
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
        # Flush, so that a log file is up to date.
        console.file.flush()


def clock(seconds: float) -> str:
    """Format a duration as `hours:minutes:seconds`, or `minutes:seconds` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
