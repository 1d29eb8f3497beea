"""One run of a study that trains on documents: what it is."""

from dataclasses import dataclass, field
from typing import Any

from recurrent_bart.studies.study_run import file_name

# how documents are read: all segments by the model that the flags name; of each section the head alone; the whole
# document at once, by LED
READINGS = ("segments", "heads", "whole")


@dataclass(frozen=True)
class TextRun:
    """A model from scratch on documents.

    Attributes:
        name: What is compared; runs that differ in their seed alone share it.
        task: What the documents are called in tables.
        flags: Of launch/train.py, those of the model, the documents and the steps.
        seed: Of weights and the order of documents.
        reads: One of `READINGS`.
        seconds: Of training, at which it ends, evaluations not counted; None: at `--max_steps` alone.
    """

    name: str
    task: str
    flags: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    reads: str = READINGS[0]
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.reads not in READINGS:
            raise ValueError(f"reads={self.reads!r}: allowed are {', '.join(map(repr, READINGS))}")

    def task_name(self) -> str:
        """What the documents are called in tables and files."""
        return self.task

    def file_name(self) -> str:
        """Name of its file."""
        return file_name(self.task, self.name, self.seed)
