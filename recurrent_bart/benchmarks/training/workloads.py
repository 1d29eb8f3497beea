"""Workloads of the training benchmark: flags of `launch/train.py`, and documents that fit these flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_bart.benchmarks.training.equal_documents import EqualDocuments
from recurrent_bart.benchmarks.training.results import Launch
from recurrent_bart.training.arguments import Arguments, parse_arguments

# BART-base with BART's vocabulary on GPUs, a tiny model on a CPU
WORK: dict[str, dict[str, Any]] = {
    "cuda": {
        "model_size": "base",
        "vocab_size": 50265,
        "segment_size": 512,
        "max_n_segments": 8,
        "max_target_length": 64,
        "per_device_train_batch_size": 8,
    },
    "cpu": {
        "model_size": "tiny",
        "vocab_size": 1000,
        "segment_size": 64,
        "max_n_segments": 2,
        "max_target_length": 16,
        "per_device_train_batch_size": 2,
    },
}
EVERYWHERE = {
    "bptt_depth": -1,
    "decoder_context": "last",
    "wandb_mode": "disabled",
    "lr_scheduler": "constant",
    "eval_documents": 1,
    "timeout_minutes": 5,
    "step_timeout_seconds": 120,
}
# A log line synchronizes with the GPU, so runs on GPUs log every 5 steps. The part "loop" logs every 10 steps, which is
# the default of launch/train.py.
LOG_EVERY = {"runs": {"cuda": 5, "cpu": 1}, "loop": {"cuda": 10, "cpu": 10}}
# interval in steps that no run reaches, so that a run has no evaluation between its steps
NEVER = 10**9
# the training documents are enough for this number of steps; then they repeat
N_STEPS_OF_DOCUMENTS = 4


@dataclass(frozen=True)
class Work:
    """Settings that all launches share.

    Attributes:
        device: "cuda" or "cpu".
        given: Flags of `launch/train.py` that override the defaults of the benchmark.
        steps: Number of steps of a run, warm-up included.
        warmup: Number of warm-up steps.
        rounds: Number of rounds in which the training loop and bare steps alternate.
    """

    device: str
    given: tuple[str, ...]
    steps: int
    warmup: int
    rounds: int

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: must be below --steps {self.steps}, and not negative")
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: must be at least 1")
        own = self._own(Path(), Launch("runs", 1, Path())).keys() | {"task", "dataset", "model_name_or_path", "resume"}
        taken = [flag for flag in self.given if flag.split("=")[0].removeprefix("--") in own]
        if taken:
            raise ValueError(f"{taken[0]}: the benchmark sets this flag; remove it")
        if self.arguments("runs").model.max_n_segments in (None, -1):
            raise ValueError("--max_n_segments -1: must be at least 1 in this benchmark")

    def arguments(self, part: str) -> Arguments:
        """Parse the flags that all runs of one part of the benchmark have. Raise ValueError for an invalid flag."""
        return parse_arguments(self._common(part))

    def flags(self, launch: Launch, place: Path) -> list[str]:
        """Return the command-line flags of one training run. `place` is the folder for documents and derived files."""
        return [*self._common(launch.part), *_as_flags(self._own(place, launch))]

    def documents(self, most_processes: int) -> EqualDocuments:
        """Return documents that fill all segments, with targets of full length."""
        arguments = self.arguments("runs")
        model, run, n_target = arguments.model, arguments.run, arguments.data.max_target_length
        n_step = run.per_device_train_batch_size * run.gradient_accumulation_steps * most_processes
        # segments also hold special tokens, so the last tokens of a document are truncated
        n_tokens = (model.max_n_segments or 0) * (model.segment_size or 0)
        return EqualDocuments(N_STEPS_OF_DOCUMENTS * n_step, n_tokens, n_target, model.vocab_size)

    def _common(self, part: str) -> list[str]:
        defaults = {**EVERYWHERE, **WORK[self.device], "log_every": LOG_EVERY[part][self.device]}
        return [*_as_flags(defaults), *self.given]

    def _own(self, place: Path, launch: Launch) -> dict[str, Any]:
        return {
            "deepspeed": launch.sharding,
            "max_steps": self.steps,
            "eval_every": NEVER,
            "save_every": 0,
            "train_file": place / "train.jsonl",
            "validation_file": place / "validation.jsonl",
            "tokenizer_name": place / "tokenizer",
            "cache_dir": place / "cache",
            "output_dir": place / launch.name(),
        }


def _as_flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
