"""Trackers that receive the metrics of a run. An error in a tracker never stops the run."""

import functools
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Protocol, TypeVar

from recurrent_bart.run_folder import RunFolder

Record = dict[str, Any]
Result = TypeVar("Result")
# Function that prints a warning.
Warn = Callable[[str], None]


class Tracker(Protocol):
    """Receiver of metrics; `fields.py` describes the fields of a record."""

    def log(self, record: Record) -> None:
        """Log the metrics of one `step`."""

    def alert(self, title: str, text: str) -> None:
        """Send an alert to the user."""

    def finish(self, is_success: bool) -> str | None:
        """Close the tracker. Return a text if the user has something left to do, for example an upload.

        `is_success` states that the run ended normally and that a checkpoint covers all logged steps.
        """


class MetricsFile:
    """Tracker that writes `metrics.jsonl`. Every run has this file. Other trackers restore their history from it."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def log(self, record: Record) -> None:
        """Append the record as one line."""
        self.folder.append_metrics(record)

    def alert(self, title: str, text: str) -> None:
        """Do nothing: the log already contains the event."""

    def finish(self, is_success: bool) -> str | None:
        """Do nothing: every line is written immediately."""
        return None


class Guarded:
    """Wrapper of the tracker that `make` creates. Exceptions of that tracker become one warning.

    With `gives_up`, the first failure disables the tracker, because a failure may take long. Otherwise, each call tries
    the tracker again.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Warn, gives_up: bool = True):
        self.name, self.warn, self.gives_up = name, warn, gives_up
        self.has_warned = False
        self.tracker: Tracker | None = None
        self.tracker = self._try(make)

    def log(self, record: Record) -> None:
        """Log the record; see `Tracker`."""
        if self.tracker:
            self._try(functools.partial(self.tracker.log, record))

    def alert(self, title: str, text: str) -> None:
        """Send the alert; see `Tracker`."""
        if self.tracker:
            self._try(functools.partial(self.tracker.alert, title, text))

    def finish(self, is_success: bool) -> str | None:
        """Close the tracker; see `Tracker`."""
        return self._try(functools.partial(self.tracker.finish, is_success)) if self.tracker else None

    def _try(self, act: Callable[[], Result]) -> Result | None:
        # A third-party error of any type must not stop the run.
        try:
            return act()
        except Exception as error:
            if not self.has_warned:
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warn(f"{self.name}: {reason}; training continues without {self.name}")
            self.has_warned = True
            if self.gives_up:
                self.tracker = None
        return None


class Trackers:
    """List of trackers that receive the same calls."""

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = trackers

    def log(self, record: Record) -> None:
        """Send a record to all trackers, without values that are None or not finite."""
        for tracker in self.trackers:
            tracker.log(known(record))

    def alert(self, title: str, text: str) -> None:
        """Send an alert with all trackers."""
        for tracker in self.trackers:
            tracker.alert(title, text)

    def finish(self, is_success: bool) -> list[str]:
        """Close all trackers. Return the texts that tell the user what is left to do."""
        lines = [tracker.finish(is_success) for tracker in self.trackers]
        return [line for line in lines if line]


def known(record: Record) -> Record:
    """Return the record without None and non-finite numbers, which JSON cannot represent."""
    is_endless = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: value for name, value in record.items() if value is not None and name not in is_endless}


def curves_of(record: Record) -> dict[str, float]:
    """Return a dictionary from curve name to number. Text fields of the record are left out.

    A list gives the curves `name/0`, `name/1` and so on. A table (layers by segments) gives the mean of each row as
    `name/layer_0` and so on, and the mean of each column as `name/segment_0` and so on.
    """
    curves: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            curves |= {f"{name}/layer_{place}": fmean(row) for place, row in enumerate(value)}
            columns = zip(*value, strict=True)
            curves |= {f"{name}/segment_{place}": fmean(column) for place, column in enumerate(columns)}
        elif isinstance(value, list):
            curves |= {f"{name}/{place}": number for place, number in enumerate(value)}
        elif isinstance(value, int | float):
            curves[name] = value
    return curves
