"""Folder of a run: its files and how they are written.

RUN/config.json      configurations of the run, the model and DeepSpeed; git commit; versions
RUN/metrics.jsonl    one line per logged step and per evaluation; fields.py documents the fields
RUN/samples.md       source, target and generated text of some documents at each evaluation
RUN/predictions.jsonl  texts of the model in RUN/model for some validation documents, with targets and scores
RUN/wandb/           files of wandb; can be uploaded later if wandb was offline
RUN/tensorboard/     TensorBoard files, with --tensorboard
RUN/curves.png       loss, ROUGE, learning rate and throughput against steps
RUN/checkpoints/     checkpoints, from which the run can be resumed
RUN/model/           best model so far, for from_pretrained
RUN/lock             process that trains in the folder; see run_lock.py
RUN/tokenizer/       tokenizer
"""

import contextlib
import itertools
import json
import math
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

from recurrent_bart.files import atomic_write

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "sentencepiece", "recurrent-bart")

SAMPLE_TEXTS = ("source", "target", "generated")
# largest number of characters of a text in samples.md, and width of the lines in samples.md
SAMPLE_CHARACTERS = 1200
SAMPLE_WIDTH = 100
# matches a title, the id of a sample, or one of its texts up to an empty line
SAMPLE_PART = re.compile(
    r"^## Step (?P<step>\d+)\n|^### (?P<fence>`+) (?P<id>.*) (?P=fence)\n"
    rf"|^(?P<name>{'|'.join(SAMPLE_TEXTS)})\n\n(?P<block>(?:    .*\n)+)\n",
    flags=re.MULTILINE,
)


class RunFolder:
    """Paths, readers and writers of a run's files."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.samples_file = path / "samples.md"
        self.predictions_file = path / "predictions.jsonl"
        self.curves_file = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.tokenizer = path / "tokenizer"

    def check_new(self) -> None:
        """Check that a new run can begin in this folder, without writing to it.

        Raises:
            ValueError: The folder already holds a run, or cannot be written.
        """
        if self.config_file.exists():
            again = shlex.quote(str(self.path))
            raise ValueError(
                f"--output_dir {self.path} already holds a run: continue it with --resume {again}, or give "
                "another folder"
            )
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise ValueError(f"--output_dir {self.path}: {existing} is not a folder")
        try:
            # a temporary file detects what permission bits do not show, for example a read-only mount
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise ValueError(f"--output_dir {self.path}: cannot be written ({error.strerror})") from error

    def create(self, exist_ok: bool = True) -> list[Path]:
        """Create the folder and its missing parents. Return the created paths, innermost first.

        Raises:
            FileExistsError: The folder exists and `exist_ok` is False.
            ValueError: The folder cannot be created.
        """
        absolute = self.path.absolute()
        missing = list(itertools.takewhile(lambda path: not path.exists(), (absolute, *absolute.parents)))
        try:
            self.path.mkdir(parents=True, exist_ok=exist_ok)
            return missing
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.is_dir():
                raise
            raise ValueError(f"--output_dir {self.path}: the folder cannot be created ({error.strerror})") from error

    def write_config(self, **sections: Any) -> None:
        """Write the resolved configuration, the git commit and the versions of packages."""
        everything = {**sections, "git_commit": git_commit(), "versions": versions()}
        atomic_write(self.config_file, json.dumps(everything, indent=2, default=str) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read config.json. Raise ValueError if it is missing or cannot be parsed."""
        try:
            return json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume {self.path}: {self.config_file} is missing or unreadable ({error})") from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl. NaN and infinity are written as null, because JSON does not allow them."""
        line = json.dumps({name: _finite(value) for name, value in record.items()}) + "\n"
        with self.metrics_file.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            # a full disk or a crash may leave an incomplete last line: begin a new line after it
            is_cut_off = file.read(1) not in (b"", b"\n")
            file.write(("\n" * is_cut_off + line).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the JSON rows of metrics.jsonl. Incomplete lines are skipped."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def forget_after(self, step: int, evaluated_step: int) -> None:
        """Delete metrics and samples logged after a checkpoint, because the resumed run logs them again.

        `step` is the step of the checkpoint. `evaluated_step` is the last step before the checkpoint with an
        evaluation; -1: no evaluation.
        """
        last = {True: evaluated_step, False: step}
        remaining = [record for record in self.read_metrics() if record["step"] <= last["validation_loss" in record]]
        atomic_write(self.metrics_file, "".join(json.dumps(record) + "\n" for record in remaining))
        if self.samples_file.exists():
            parts = re.split(r"^(?=## Step \d+$)", self.samples_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            atomic_write(self.samples_file, "".join(part for part in parts if _step_of(part) <= evaluated_step))

    def append_samples(self, title: str, samples: Sequence[Any]) -> None:
        """Append samples under a title to samples.md. Long texts are shortened to `SAMPLE_CHARACTERS`."""
        parts = [f"## {title}\n\n"]
        for sample in samples:
            parts.append(f"### {_code(sample.id)}\n\n")
            parts += [f"{name}\n\n{_block(getattr(sample, name))}\n" for name in SAMPLE_TEXTS]
        with self.samples_file.open("a", encoding="utf-8") as file:
            file.write("".join(parts))

    def read_samples(self) -> list[dict[str, Any]]:
        """Read samples.md. Each sample has `step`, `id` and its texts. Incomplete texts are left out."""
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


def git_commit() -> str | None:
    """Return the git commit of this package, with `-dirty` if files differ, or None outside its checkout."""
    file = Path(__file__)
    try:
        # a package installed inside another repository is no part of that repository
        if _git(file.parent, "rev-parse", "--show-prefix") != f"{file.parent.name}/":
            return None
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the main packages. The version of a missing package is None."""
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


# inline code and indented blocks are the Markdown that needs no escaping
def _code(text: str) -> str:
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}"


def _block(text: str) -> str:
    line = " ".join(text.split())
    if len(line) > SAMPLE_CHARACTERS:
        head = line[:SAMPLE_CHARACTERS]
        line = f"{head} [... {len(line) - len(head):,} more characters]"
    # words stay whole, so that `read_samples` can join the lines again
    lines = textwrap.wrap(line, SAMPLE_WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"    {part}\n" for part in lines) or "    \n"
