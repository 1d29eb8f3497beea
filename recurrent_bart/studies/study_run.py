"""One run of a study: what it is, and its file."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from recurrent_bart.run_folder import atomic_write
from recurrent_bart.studies.tasks.babi import load_babi
from recurrent_bart.studies.tasks.memory_tasks import SYMBOL_TASKS, MemoryTask

WINDOWS = ("segments", "all", "last")
# what a run's fields change
MODEL: dict[str, Any] = {
    "d_model": 256,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "pre_seq_len": 32,
    "bptt_depth": -1,
    "dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    # with BART's 0.02 so small a model had learnt nothing after a thousand steps (RESULTS.md)
    "init_std": 0.06,
}


class Run(Protocol):
    """What studies are made of."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """What is compared; runs that differ in their seed alone share it."""

    def task_name(self) -> str:
        """What the task is called in tables and files."""

    def file_name(self) -> str:
        """Name of its file."""


def file_name(task: str, name: str, seed: int) -> str:
    """Name of a run's file: task, what is compared, seed."""
    words = re.sub(r"[^\w.=-]+", "-", f"{task}-{name}")
    return f"{words}-seed{seed}.json"


def describe_device(device: str) -> str:
    """Name of a GPU, or `cpu`."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class StudyRun:
    """A model from scratch on a memory task.

    Attributes:
        name: What is compared; runs that differ in their seed alone share it.
        task: `"name"` of a task and its fields; for `"babi"` what `load_babi` takes.
        model: Fields of RecurrentBartConfig that differ from `MODEL`. Dropout would make a run depend on those beside
            it in a process, for they share its random numbers.
        window: `"segments"`: one after another; `"all"`: all their tokens as one segment; `"last"`: the last alone.
        seed: Of weights and of documents to train on; those to test on are the same in every run.
        segment_size: Tokens of a segment.
        easier: Stages before all others, each with the fields of the task that differ, `segment_size`, and
            `n_segments`, most segments of a document, one unless given.
        stages: Most segments of a document to train on, stage by stage.
        threshold: Token accuracy that ends a stage.
        stage_steps: Steps that end it in any case; 0: none do.
        test_segments: Numbers of segments to test on.
        max_steps: Optimizer steps, unless the task is learnt before.
        batch_size: Documents of a step.
        learning_rate: Highest one.
        lr_scheduler: Decay after warm-up: linear, cosine or constant.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: Of matrices.
        adam_beta2: Of the mean of squared gradients, what a step keeps.
        max_grad_norm: Gradients are clipped to this norm.
        encoder_loss: Weight of a second loss: of the answer as the token head finds it in what the encoder gives
            where it is asked for. Without it a decoder that sees all that was read learns to rule answers out.
        bf16: Compute in bfloat16, by autocast.
        eval_every: Steps between evaluations.
        eval_documents: Documents of an evaluation.
    """

    name: str
    task: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    window: str = "segments"
    seed: int = 0
    segment_size: int = 64
    easier: tuple[dict[str, Any], ...] = ()
    stages: tuple[int, ...] = (1, 2, 4, 8)
    threshold: float = 0.95
    stage_steps: int = 2000
    test_segments: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    max_steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 5e-4
    lr_scheduler: str = "linear"
    warmup_steps: int = 500
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    encoder_loss: float = 0.0
    bf16: bool = False
    eval_every: int = 100
    eval_documents: int = 256

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window={self.window!r}: allowed are {', '.join(map(repr, WINDOWS))}")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "StudyRun":
        """The run that `asdict` and a file of JSON made a record of.

        Raises:
            ValueError: It has a field that runs do not have.
        """
        unknown = set(record) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"a run has no field {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**values)

    def task_name(self) -> str:
        """What the task is called in tables and files."""
        settings = {name: value for name, value in self.task.items() if name not in ("name", "facts", "filler")}
        if self.task["name"] == "babi":
            return settings["task"]
        return " ".join([self.task["name"], *(f"{name}={value}" for name, value in settings.items())])

    def file_name(self) -> str:
        """Name of its file: task, what is compared, seed."""
        return file_name(self.task_name(), self.name, self.seed)

    def build_tasks(self, **changes: Any) -> tuple[MemoryTask, MemoryTask]:
        """What to train and what to test on.

        Args:
            changes: Fields of the task that differ.

        Raises:
            ValueError: There is no such task, or its files are missing.
        """
        settings = self.task | changes
        name = settings.pop("name")
        if name == "babi":
            settings |= {key: Path(settings[key]) for key in ("facts", "filler")}
            splits = load_babi(**settings | {"renamed": tuple(map(tuple, settings.get("renamed", ())))})
            return splits["train"], splits["validation"]
        if name not in SYMBOL_TASKS:
            raise ValueError(f"task {name!r}: known are {', '.join(SYMBOL_TASKS)}, babi")
        task = SYMBOL_TASKS[name](**settings)
        return task, task


class RunFile:
    """The file of a run: what it is, how it goes, what came of it. It is whole at any moment."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        """Everything in it.

        Raises:
            ValueError: It is missing or unreadable.
        """
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: unreadable ({error})") from error

    def write(self, record: dict[str, Any]) -> None:
        """Replace it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(record, indent=1) + "\n")

    def is_finished(self, run: Run) -> bool:
        """Whether it holds all that comes of this run, as it is defined now."""
        record = self.read() if self.path.exists() else {}
        return record.get("stopped") not in (None, "budget") and record["run"] == _described(run)

    def begin(self, run: Run) -> None:
        """Write what is to be run; what there is of the same run stays until there is more."""
        if not self.path.exists() or self.read().get("run") != _described(run):
            self.write({"run": _described(run)})

    def fail(self, error: str) -> None:
        """Write why the run failed, beside what there is of it."""
        self.write(self.read() | {"error": error})


def _described(run: Run) -> dict[str, Any]:
    """A run as a file has it, where tuples are lists."""
    return json.loads(json.dumps(asdict(run)))
