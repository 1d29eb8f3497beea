"""Where the figures of a run go. What fails there never stops the run."""

import functools
import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Protocol, TypeVar

from recurrent_bart.run_folder import RunFolder

Record = dict[str, Any]
Result = TypeVar("Result")
# says a warning
Warn = Callable[[str], None]


class Tracker(Protocol):
    """Something that figures are told to; `fields.py` says what a record holds."""

    def log(self, record: Record) -> None:
        """Take down the figures of a `step`."""

    def alert(self, title: str, text: str) -> None:
        """Call the user's attention."""

    def finish(self, is_success: bool) -> str | None:
        """Write what is left; nothing is logged afterwards.

        Args:
            is_success: The run ended as it should, all that was logged being covered by a checkpoint.

        Returns:
            A line for the user, if there is something to do.
        """


class MetricsFile:
    """`metrics.jsonl`, the one that is always written and that the others are made whole from.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def log(self, record: Record) -> None:
        """Add a line."""
        self.folder.append_metrics(record)

    def alert(self, title: str, text: str) -> None:
        """What it is about stands in the log already."""

    def finish(self, is_success: bool) -> str | None:
        """Every line is written at once."""
        return None


class Guarded:
    """A tracker whose failures end at a warning.

    Args:
        name: What it is called in the warning.
        make: Makes it.
        warn: Says the warning.
        gives_up: Leave it alone from its first failure on, for it may take long to fail; False: try again each time.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Warn, gives_up: bool = True):
        self.name, self.warn, self.gives_up = name, warn, gives_up
        self.has_warned = False
        self.tracker: Tracker | None = None
        self.tracker = self._try(make)

    def log(self, record: Record) -> None:
        """As the tracker's."""
        if self.tracker:
            self._try(functools.partial(self.tracker.log, record))

    def alert(self, title: str, text: str) -> None:
        """As the tracker's."""
        if self.tracker:
            self._try(functools.partial(self.tracker.alert, title, text))

    def finish(self, is_success: bool) -> str | None:
        """As the tracker's."""
        return self._try(functools.partial(self.tracker.finish, is_success)) if self.tracker else None

    def _try(self, act: Callable[[], Result]) -> Result | None:
        # whatever others raise, the run is worth more
        try:
            return act()
        except Exception as error:
            if not self.has_warned:
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warn(f"{self.name}: {reason}; training goes on without it")
            self.has_warned = True
            if self.gives_up:
                self.tracker = None
        return None


class Trackers:
    """Several as one.

    Args:
        trackers: Each of them.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = trackers

    def log(self, record: Record) -> None:
        """Tell all what is known."""
        for tracker in self.trackers:
            tracker.log(known(record))

    def alert(self, title: str, text: str) -> None:
        """Tell all."""
        for tracker in self.trackers:
            tracker.alert(title, text)

    def finish(self, is_success: bool) -> list[str]:
        """Finish all; what they have to say to the user."""
        lines = [tracker.finish(is_success) for tracker in self.trackers]
        return [line for line in lines if line]


def known(record: Record) -> Record:
    """The record without what is not there or not finite, which JSON has no word for."""
    is_endless = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: value for name, value in record.items() if value is not None and name not in is_endless}


def curves_of(record: Record) -> dict[str, float]:
    """The numbers of a record by name, one for each curve.

    A list becomes `name/0`, `name/1`; a table by layer and segment the means `name/layer_0` and `name/segment_0`.
    Texts are left out.
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
