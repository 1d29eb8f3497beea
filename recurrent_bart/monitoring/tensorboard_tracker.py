"""Tracker that writes metrics to TensorBoard event files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from recurrent_bart.monitoring.tracker import Record, curves_of


class TensorBoardTracker:
    """Tracker that writes TensorBoard event files. A resumed run writes all events again from `history`."""

    def __init__(self, folder: Path, history: Iterable[Record]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError('tensorboardX is not installed: pip install "recurrent-bart[tensorboard]"') from error
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder), flush_secs=10)
        for record in history:
            self.log(record)

    def log(self, record: Record) -> None:
        """Add a point to each curve."""
        for name, number in curves_of(record).items():
            if name != "step":
                self.writer.add_scalar(name, number, record["step"])

    def alert(self, title: str, text: str) -> None:
        """Add the alert as a text."""
        self.writer.add_text(title, text)

    def finish(self, is_success: bool) -> str | None:
        """Close the event file."""
        self.writer.close()
        return None
