"""Description of one training run of a study on documents."""

from dataclasses import dataclass, field
from typing import Any

from recurrent_bart.studies.study_run import file_name

# "segments" and "heads" use the model of the flags. It reads all segments, or the start of each section. With "whole",
# LED reads the document as one segment.
READINGS = ("segments", "heads", "whole")


@dataclass(frozen=True)
class TextRun:
    """Description of one training run from scratch on documents.

    Attributes:
        name: Name of the variant. Runs that differ only in the seed have the same name.
        task: Name of the documents in tables.
        flags: launch/train.py flags of the model, the documents and the steps.
        seed: Seed of weights and of the order of documents.
        reads: One of `READINGS`.
        seconds: Training time, evaluations excluded, after which the run ends. None: only `--max_steps` ends the run.
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
        """Return the name of the documents for tables and files."""
        return self.task

    def file_name(self) -> str:
        """Return the name of the run's file."""
        return file_name(self.task, self.name, self.seed)
