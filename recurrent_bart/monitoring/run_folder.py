"""The folder of a run: what is in it and how it is written.

RUN/config.json      model, run and DeepSpeed configuration, git commit, versions
RUN/metrics.jsonl    one line for each logged step and each evaluation; fields.py says what is in it
RUN/samples.md       at each evaluation, source, target and generated text side by side
RUN/wandb/           what wandb wrote, to be uploaded if it was offline
RUN/tensorboard/     curves for TensorBoard, if asked for
RUN/curves.png       loss, ROUGE, learning rate and throughput against steps
RUN/checkpoints/     what a run is continued from
RUN/model/           the best model so far, for from_pretrained
RUN/tokenizer/       its tokenizer
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "sentencepiece", "recurrent-bart")

MARKUP = re.compile(r"[\\`*_\[\]<>|~&]")


class RunFolder:
    """Writes into the folder of a run."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.md"
        self.curves_file = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.tokenizer = path / "tokenizer"

    def check_new(self) -> None:
        """Refuse a place where no run can begin, and leave nothing there.

        Raises:
            ValueError: It holds a run already, or cannot be written.
        """
        if self.config_file.exists():
            raise ValueError(f"--output_dir {self.path}: a run is there already; continue it with --resume {self.path}")
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise ValueError(f"--output_dir {self.path}: {existing} is not a folder")
        try:
            # asks the file system, where a permission bit may not say all
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise ValueError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from error

    def create(self) -> None:
        """Make the folder if it is not there.

        Raises:
            ValueError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output_dir {self.path}: cannot be made ({error.strerror})") from error

    def write_config(self, **sections: Any) -> None:
        """Write the resolved configuration with the commit and the versions that it ran on."""
        everything = {**sections, "git_commit": git_commit(), "versions": versions()}
        replace_file(self.config_file, json.dumps(everything, indent=2, default=str) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The configuration written before.

        Raises:
            ValueError: There is no run in the folder, or its configuration is unreadable.
        """
        try:
            return json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume {self.path}: no readable config.json there ({error})") from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line; a number that is not finite, which JSON has no name for, is written as null."""
        line = json.dumps({name: _finite(value) for name, value in record.items()}) + "\n"
        with self.metrics_file.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            # what a full disk or a crash cut off stays a line of its own
            is_cut_off = file.read(1) not in (b"", b"\n")
            file.write(("\n" * is_cut_off + line).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines; those that were cut off are left out."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def forget_after(self, step: int, evaluated_step: int) -> None:
        """Drop what was logged and evaluated later, for a run that goes on from there and does both again.

        Args:
            step: Steps done.
            evaluated_step: The last step after which it was evaluated; -1: none.
        """
        last = {True: evaluated_step, False: step}
        kept = [record for record in self.read_metrics() if record["step"] <= last["validation_loss" in record]]
        replace_file(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        if self.samples_file.exists():
            parts = re.split(r"^(?=## Step \d+$)", self.samples_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            replace_file(self.samples_file, "".join(part for part in parts if _step_of(part) <= max(0, evaluated_step)))

    def append_samples(self, title: str, samples: Sequence[Any]) -> None:
        """Add some samples under a title."""
        lines = [f"## {title}\n"]
        for sample in samples:
            fields = [("source", sample.source), ("target", sample.target), ("generated", sample.generated)]
            lines += [f"### {_table_cell(sample.id)}\n", "| | |", "|---|---|"]
            lines += [f"| {name} | {_table_cell(text)} |" for name, text in fields] + [""]
        with self.samples_file.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def read_samples(self) -> list[dict[str, Any]]:
        """All of them, each with `step`, `id`, `source`, `target` and `generated`; cut off ones lack the last."""
        samples: list[dict[str, Any]] = []
        step = 0
        text = self.samples_file.read_text(encoding="utf-8") if self.samples_file.exists() else ""
        for line in text.split("\n"):
            step = _step_of(line) or step
            if line.startswith("### "):
                samples.append({"step": step, "id": _plain(line.removeprefix("### "))})
            cell = re.fullmatch(r"\| (source|target|generated) \| (.*) \|", line)
            if cell and samples:
                samples[-1][cell[1]] = _plain(cell[2])
        return samples


def replace_file(path: Path, text: str) -> None:
    """Write a file so that at any moment either the old or the new one is there, whole."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def git_commit() -> str | None:
    """Commit of the code that runs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the run depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(samples: str) -> int:
    title = re.match(r"## Step (\d+)$", samples, flags=re.MULTILINE)
    return int(title[1]) if title else 0


def _table_cell(text: str) -> str:
    """The text on one line, with what Markdown would take for its own shown as it is."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _plain(cell: str) -> str:
    """What `_table_cell` was given."""
    return re.sub(r"\\(.)", r"\1", cell)
