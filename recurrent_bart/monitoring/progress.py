"""What is shown on the terminal while a run goes on."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """A bar with loss, throughput and time left; plain lines where the output is not a terminal."""

    def __init__(self, first_step: int, max_steps: int):
        self.console = Console()
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("train", total=max_steps, completed=first_step, status="")
        self.max_steps = max_steps

    def __enter__(self) -> "ProgressDisplay":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def step(self, step: int) -> None:
        """An optimizer step is done."""
        self.bar.update(self.task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """Show figures that were logged."""
        if "loss" in record:
            status = (
                f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
                f"lr {record['learning_rate']:.1e}"
            )
            self.bar.update(self.task, status=status)
            if self.bar.disable:
                left = record["seconds_left"]
                print(
                    f"step {record['step']}/{self.max_steps}  {status}  left {left // 60:.0f}:{left % 60:02.0f}",
                    flush=True,
                )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
