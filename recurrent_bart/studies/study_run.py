"""Description of one training run of a study on memory tasks, and the JSON file of a run."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from recurrent_bart.files import atomic_write
from recurrent_bart.studies.tasks.babi import load_babi
from recurrent_bart.studies.tasks.memory_tasks import SYMBOL_TASKS, MemoryTask

WINDOWS = ("segments", "all", "last")
# Default fields of the model's configuration. The field `model` of a run overrides them.
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
    # with BART's 0.02, a model this small learned nothing in one thousand steps (studies/LOG.md)
    "init_std": 0.06,
}


class Run(Protocol):
    """Interface of the descriptions of runs."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the variant. Runs that differ only in the seed have the same name."""

    def task_name(self) -> str:
        """Return the task's name for tables and files."""

    def file_name(self) -> str:
        """Return the name of the run's file."""


def file_name(task: str, name: str, seed: int) -> str:
    """Return the file name for a task, a variant and a seed."""
    words = re.sub(r"[^\w.=-]+", "-", f"{task}-{name}")
    return f"{words}-seed{seed}.json"


def describe_device(device: str) -> str:
    """Return the name of a GPU, or `cpu`."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class StudyRun:
    """Description of one training run from scratch on a memory task.

    Attributes:
        name: Name of the variant. Runs that differ only in the seed have the same name.
        task: `"name"` of the task, and the task's fields. For `"babi"`, the fields are the arguments of `load_babi`.
        model: RecurrentBartConfig fields that differ from `MODEL`. With dropout, results depend on the other runs in
            the process, because they share one random generator.
        window: `"segments"`: the model reads all segments in order. `"all"`: it reads the document as one long segment.
            `"last"`: it reads only the last segment.
        seed: Seed of weights and training documents. Test documents are the same in every run.
        easier: Easier stages, before `stages`. Each stage overrides task fields, `segment_size` or `n_segments`
            (maximum number of segments, default 1).
        stages: Maximum number of segments of training documents, one entry per stage.
        threshold: Token accuracy that ends a stage.
        stage_steps: Maximum number of steps of a stage; 0 sets no limit.
        encoder_loss: Weight of a second loss: the token head predicts the answer from the encoder's output at
            `answer_places`. Without it, a decoder that sees all tokens learns to rule answers out.
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
    # True: compute in bfloat16 by autocast
    bf16: bool = False
    eval_every: int = 100
    eval_documents: int = 256

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window={self.window!r}: allowed are {', '.join(map(repr, WINDOWS))}")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "StudyRun":
        """Build the run from `record`, the JSON form of `asdict`. Raise ValueError if a field is unknown."""
        unknown = set(record) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"a run has no field {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**values)

    def task_name(self) -> str:
        """Return the task's name for tables and files."""
        settings = {name: value for name, value in self.task.items() if name not in ("name", "facts", "filler")}
        if self.task["name"] == "babi":
            return settings["task"]
        return " ".join([self.task["name"], *(f"{name}={value}" for name, value in settings.items())])

    def file_name(self) -> str:
        """Return the name of the run's file, which consists of task, variant and seed."""
        return file_name(self.task_name(), self.name, self.seed)

    def build_tasks(self, **changes: Any) -> tuple[MemoryTask, MemoryTask]:
        """Build the training task and the test task, with `changes` to the task's fields.

        Raises:
            ValueError: The task is unknown, or its files are missing.
        """
        settings = self.task | changes
        name = settings.pop("name")
        if name == "babi":
            settings |= {key: Path(settings[key]) for key in ("facts", "filler")}
            splits = load_babi(**settings | {"renamed": tuple(map(tuple, settings.get("renamed", ())))})
            return splits["train"], splits["validation"]
        if name not in SYMBOL_TASKS:
            raise ValueError(f"task {name!r}: allowed are {', '.join(SYMBOL_TASKS)}, babi")
        task = SYMBOL_TASKS[name](**settings)
        return task, task


class RunFile:
    """JSON file of one run, which holds the run's definition, progress and result. Writes are atomic."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return the content of the file.

        Raises:
            ValueError: The file is missing or unreadable.
        """
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: unreadable ({error})") from error

    def write(self, record: dict[str, Any]) -> None:
        """Replace the content of the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(record, indent=1) + "\n")

    def is_finished(self, run: Run) -> bool:
        """Return True if the file holds a complete result and the same definition as `run`."""
        record = self.read() if self.path.exists() else {}
        return record.get("stopped") not in (None, "budget") and record["run"] == _described(run)

    def begin(self, run: Run) -> None:
        """Write the run's definition. If the file already has this definition, keep the earlier results."""
        if not self.path.exists() or self.read().get("run") != _described(run):
            self.write({"run": _described(run)})

    def fail(self, error: str) -> None:
        """Add the error that ended the run to the file."""
        self.write(self.read() | {"error": error})


def _described(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(run)))
