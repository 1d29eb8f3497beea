"""A run of a study that trains on documents: `launch/train.py`, and what its log tells."""

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurrent_bart.monitoring.run_folder import RunFolder
from recurrent_bart.studies.study_run import RunFile, describe_device, file_name
from recurrent_bart.training.outcome import ExitCode

# as good as none, where the time has no end
MOST_MINUTES = 1e6
# what an evaluation is kept of
KEPT = ("step", "validation_loss", "rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class TextRun:
    """A model from scratch on documents.

    Attributes:
        name: What is compared; runs that differ in their seed alone share it.
        task: What the documents are called in tables.
        flags: Of launch/train.py.
        seed: Of weights and the order of documents.
    """

    name: str
    task: str
    flags: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def task_name(self) -> str:
        """What the documents are called in tables and files."""
        return self.task

    def file_name(self) -> str:
        """Name of its file; its run folder lies beside it."""
        return file_name(self.task, self.name, self.seed)


def execute_text(file: RunFile, train_script: Path, device: str, budget_seconds: float) -> None:
    """Do the run that a file describes, or go on with it, and write what its log tells.

    Args:
        file: The file.
        train_script: launch/train.py.
        device: `"cpu"` or `"cuda:NUMBER"`.
        budget_seconds: It stops after so many, with a checkpoint to go on from.

    Raises:
        ValueError: Training failed.
    """
    described = file.read()
    run = TextRun(**described["run"])
    folder = RunFolder(file.path.with_suffix(""))
    flags = {**_resumed_or_new(run, folder), "max_minutes": min(budget_seconds / 60, MOST_MINUTES)}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    # which GPU a process sees is said before it starts
    visible = device.removeprefix("cuda:") if device != "cpu" else ""
    command = ["env", f"CUDA_VISIBLE_DEVICES={visible}", sys.executable, str(train_script), *arguments]
    code = subprocess.run(command, check=False).returncode
    if code not in (ExitCode.DONE, ExitCode.STOPPED):
        raise ValueError(f"{train_script.name} ended with exit code {code}")
    stopped = "steps" if code == ExitCode.DONE else "budget"
    config = folder.read_config()
    origin = {name: config[name] for name in ("versions", "git_commit")}
    origin |= {"date": time.strftime("%Y-%m-%d"), "device": describe_device(device)}
    file.write({"run": described["run"], **origin, "stopped": stopped, "curve": evaluations(folder.read_metrics())})


def _resumed_or_new(run: TextRun, folder: RunFolder) -> dict[str, Any]:
    if not folder.config_file.exists():
        return {**run.flags, "seed": run.seed, "output_dir": folder.path}
    saved = {name: value for group in folder.read_config()["arguments"].values() for name, value in group.items()}
    for name, value in run.flags.items():
        if str(saved[name]) != str(value):
            raise ValueError(f"{folder.path}: was begun with --{name} {saved[name]}; remove it to begin anew")
    return {"resume": folder.path}


def evaluations(records: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Each evaluation with the seconds of training before it, evaluations not counted."""
    found: list[dict[str, float]] = []
    seconds, last_step = 0.0, 0
    for record in records:
        if "step_seconds" in record:
            seconds += record["step_seconds"] * (record["step"] - last_step)
            last_step = record["step"]
        if "validation_loss" in record:
            found.append({"seconds": seconds} | {name: record[name] for name in KEPT if name in record})
    return found
