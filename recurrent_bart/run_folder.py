"""The folder of a run: what is in it and how it is written.

RUN/config.json      model, run and DeepSpeed configuration, git commit, versions
RUN/metrics.jsonl    one line for each logged step and each evaluation; fields.py says what is in it
RUN/samples.md       at each evaluation, source, target and generated text side by side
RUN/wandb/           what wandb wrote, to be uploaded if it was offline
RUN/tensorboard/     curves for TensorBoard, if asked for
RUN/curves.png       loss, ROUGE, learning rate and throughput against steps
RUN/checkpoints/     what a run is continued from
RUN/model/           the best model so far, for from_pretrained
RUN/lock             while a run goes on, which process trains; see run_lock.py
RUN/tokenizer/       its tokenizer
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "sentencepiece", "recurrent-bart")

SAMPLE_TEXTS = ("source", "target", "generated")
# of each text of a sample, and of a line of it
SAMPLE_CHARACTERS = 1200
SAMPLE_WIDTH = 100
# a title, the name of a sample, or one of its texts, which an empty line ends
SAMPLE_PART = re.compile(
    r"^## Step (?P<step>\d+)\n|^### (?P<fence>`+) (?P<id>.*) (?P=fence)\n"
    rf"|^(?P<name>{'|'.join(SAMPLE_TEXTS)})\n\n(?P<block>(?:    .*\n)+)\n",
    flags=re.MULTILINE,
)


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
            again = shlex.quote(str(self.path))
            raise ValueError(f"--output_dir {self.path}: a run is there already; continue it with --resume {again}")
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise ValueError(f"--output_dir {self.path}: {existing} is not a folder")
        try:
            # asks the file system, where a permission bit may not say all
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise ValueError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from error

    def create(self, exist_ok: bool = True) -> list[Path]:
        """Make the folder.

        Args:
            exist_ok: Accept a folder that is there.

        Returns:
            The paths that were made, the innermost first.

        Raises:
            FileExistsError: The folder is there, and `exist_ok` is False.
            ValueError: It cannot be made.
        """
        whole = self.path.absolute()
        missing = list(itertools.takewhile(lambda path: not path.exists(), (whole, *whole.parents)))
        try:
            self.path.mkdir(parents=True, exist_ok=exist_ok)
            return missing
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.is_dir():
                raise
            raise ValueError(f"--output_dir {self.path}: cannot be made ({error.strerror})") from error

    def write_config(self, **sections: Any) -> None:
        """Write the resolved configuration with the commit and the versions that it ran on."""
        everything = {**sections, "git_commit": git_commit(), "versions": versions()}
        atomic_write(self.config_file, json.dumps(everything, indent=2, default=str) + "\n")

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
        atomic_write(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        if self.samples_file.exists():
            parts = re.split(r"^(?=## Step \d+$)", self.samples_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            atomic_write(self.samples_file, "".join(part for part in parts if _step_of(part) <= max(0, evaluated_step)))

    def append_samples(self, title: str, samples: Sequence[Any]) -> None:
        """Add some samples under a title, each of their texts on lines of its own, shortened if it is long."""
        parts = [f"## {title}\n\n"]
        for sample in samples:
            parts.append(f"### {_code(sample.id)}\n\n")
            parts += [f"{name}\n\n{_block(getattr(sample, name))}\n" for name in SAMPLE_TEXTS]
        with self.samples_file.open("a", encoding="utf-8") as file:
            file.write("".join(parts))

    def read_samples(self) -> list[dict[str, Any]]:
        """Return all samples, each with `step`, `id` and its texts as written. A text that is cut off is missing."""
        samples: list[dict[str, Any]] = []
        step = 0
        text = self.samples_file.read_text(encoding="utf-8") if self.samples_file.exists() else ""
        for part in SAMPLE_PART.finditer(text):
            if part["step"]:
                step = int(part["step"])
            elif part["id"]:
                samples.append({"step": step, "id": part["id"]})
            elif samples:
                samples[-1][part["name"]] = " ".join(part["block"].split())
        return samples


def atomic_write(path: Path, text: str) -> None:
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


def _code(text: str) -> str:
    """Return the text on one line as Markdown's inline code, which needs no escapes."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}"


def _block(text: str) -> str:
    """Return the text as Markdown's indented code, which needs no escapes. A long text is shortened."""
    line = " ".join(text.split())
    if len(line) > SAMPLE_CHARACTERS:
        head = line[:SAMPLE_CHARACTERS]
        line = f"{head} [... {len(line) - len(head):,} characters more]"
    # words are not broken, so that lines can be joined again
    lines = textwrap.wrap(line, SAMPLE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"    {part}\n" for part in lines) or "    \n"
