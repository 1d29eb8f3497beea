"""Description of one training run of a study on documents."""

from dataclasses import dataclass, field
from typing import Any

from recurrent_bart.studies.study_run import file_name

# parts of a document that a model reads: all segments, the start of each section, or the document as one segment
READINGS = ("segments", "heads", "whole")
# the model of the flags, the same with an embedding of each segment's number, or LED
MODELS = ("recurrent", "numbered", "led")


@dataclass(frozen=True)
class TextRun:
    """Description of one training run on documents.

    Attributes:
        name: Name of the variant. Runs that differ only in the seed have the same name.
        task: Name of the documents in tables.
        flags: launch/train.py flags of the model, the documents and the steps.
        seed: Seed of weights and of the order of documents.
        reads: One of `READINGS`.
        model: One of `MODELS`. LED reads documents whole.
        seconds: Training time, evaluations excluded, after which the run ends. None: only `--max_steps` ends the run.
    """

    name: str
    task: str
    flags: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    reads: str = READINGS[0]
    seconds: float | None = None
    model: str = MODELS[0]

    def __post_init__(self) -> None:
        for name, allowed in (("reads", READINGS), ("model", MODELS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")
        if self.model == "led" and self.reads != "whole":
            raise ValueError(f"model='led' needs reads='whole', not {self.reads!r}: LED has no segments")

    def task_name(self) -> str:
        """Return the name of the documents for tables and files."""
        return self.task

    def file_name(self) -> str:
        """Return the name of the run's file."""
        return file_name(self.task, self.name, self.seed)
