"""`slurm/train.sh` with stand-ins for SLURM's commands: flags that it passes, and reactions to the end of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launching

# Stand-in for srun: it saves its command line and behaves like a run. Its parent is a subshell of the script.
SRUN = """#!/usr/bin/env bash
[[ $* == *--overlap* ]] && exit 0
printf '%s\\0' "$@" > "$NOTES/srun"
[[ -z ${SIGNALS:-} ]] || { trap '' USR1; kill -USR1 "$(ps -o ppid= -p "$PPID")"; }
[[ -z ${WRITES:-} ]] || echo "$WRITES" > "${!#}/outcome.json"
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$NOTES/scontrol"; fi
"""


class Submitted:
    """Result of a job: exit code, output, flags of launch/train.py, and True if it was requeued."""

    def __init__(self, notes, done):
        self.code, self.printed = done.returncode, done.stdout + done.stderr
        given = (notes / "srun").read_text().split("\0")[:-1] if (notes / "srun").exists() else []
        self.flags = given[given.index("launch/train.py") + 1 :] if given else []
        self.is_requeued = (notes / "scontrol").exists()


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs the script as an array task or, with `task=None`, as a job."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def call(*flags, task=2, **variables):
        given = {
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "SLURM_JOB_ID": "42",
            "SLURM_SUBMIT_DIR": str(launching.TESTS.parent),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_JOB_NODELIST": "localhost",
            "VIRTUAL_ENV": "tests",
            "NOTES": str(tmp_path),
            **variables,
        }
        if task is not None:
            given |= {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": str(task)}
        command = ["bash", "slurm/train.sh", *map(str, flags)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | given
        done = subprocess.run(
            command, cwd=launching.TESTS.parent, env=environment, capture_output=True, text=True, timeout=60
        )
        return Submitted(tmp_path, done)

    return call


@pytest.fixture
def lines(tmp_path):
    """Write a file of flags with Windows line ends and quotes."""
    file = tmp_path / "flags of a grid.txt"
    texts = ["--seed 7", "--wandb_group 'my group' --wandb_tags \"\"", "--seed 9 --lr_scheduler cosine", "--tags 'open"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\r\n")
    return file


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        (1, ["--seed", "7"]),
        (2, ["--wandb_group", "my group", "--wandb_tags", ""]),
        (3, ["--seed", "9", "--lr_scheduler", "cosine"]),
    ],
)
def test_flags_of_a_line_are_read_without_windows_line_ends(submit, lines, tmp_path, task, flags):
    job = submit("--max_steps", 2, f"@{lines}", "--output_dir", tmp_path / "my runs", task=task)
    assert job.code == 0, job.printed
    assert job.flags == ["--max_steps", "2", *flags, "--output_dir", f"{tmp_path}/my runs/{task}"]


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(("task", "seed"), [(1, "7"), (2, "8")])
def test_each_line_counts_with_and_without_a_line_end_after_the_last(submit, tmp_path, task, seed, end):
    (tmp_path / "flags.txt").write_text(f"--seed 7\n--seed 8{end}")
    job = submit(f"@{tmp_path}/flags.txt", "--output_dir", tmp_path / "runs", task=task)
    assert job.code == 0, job.printed
    assert job.flags == ["--seed", seed, "--output_dir", f"{tmp_path}/runs/{task}"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (4, "line 4 cannot be read (No closing quotation)"),
        (5, "line 5 is missing or empty"),
        (9, "line 9 is missing or empty"),
    ],
)
def test_a_line_without_flags_ends_the_job(submit, lines, task, message):
    job = submit(f"@{lines}", task=task)
    assert job.code == 2
    assert job.printed == f"error: @{lines}: {message}\n"
    assert job.flags == []


def test_a_missing_file_ends_the_job(submit, tmp_path):
    job = submit(f"@{tmp_path}/none.txt")
    assert job.code == 2
    assert job.printed == f"error: @{tmp_path}/none.txt: cannot be read (No such file or directory)\n"


def test_the_task_number_is_the_seed_of_a_new_run(submit, tmp_path):
    folder = ["--output_dir", f"{tmp_path}/2"]
    assert submit("--output_dir", tmp_path).flags == ["--seed", "2", *folder]
    assert submit("--output_dir", tmp_path, task=None).flags == ["--output_dir", f"{tmp_path}"]
    assert submit("--resume", tmp_path).flags == ["--resume", f"{tmp_path}/2"]


@pytest.fixture
def finished(tmp_path):
    """Return the folder and the outcome of a run that a stop file ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    content = json.dumps({"code": 75, "reason": "the stop file", "step": 3})
    (folder / "outcome.json").write_text(content)
    return folder, content


def test_a_run_that_cannot_start_keeps_its_old_outcome(submit, finished):
    folder, content = finished
    job = submit("--resume", folder, task=None, CODE="2")
    assert job.code == 2
    assert not job.is_requeued
    assert (folder / "outcome.json").read_text() == content


def test_an_old_outcome_does_not_decide_about_a_requeue(submit, finished):
    # Exit code 75 without an outcome: the time limit stopped the process before training began.
    job = submit("--resume", finished[0], task=None, CODE="75")
    assert job.code == 75
    assert job.is_requeued


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_signal_just_before_the_end_does_not_hide_the_exit_code(submit, tmp_path, code):
    # a slow `kill`, so that srun has ended when the script has handled the signal
    slow = {"BASH_FUNC_kill%%": '() { sleep 0.3; builtin kill "$@"; }'}
    job = submit("--output_dir", tmp_path / "run", task=None, CODE=str(code), SIGNALS="1", **slow)
    assert job.code == code, job.printed
    assert job.is_requeued == (code == 75)


@pytest.mark.parametrize(
    ("code", "reason", "is_requeued"), [(75, "SIGUSR1", True), (75, "the stop file", False), (2, "a mistake", False)]
)
def test_the_new_outcome_decides_about_a_requeue(submit, finished, code, reason, is_requeued):
    written = json.dumps({"code": code, "reason": reason, "step": 4})
    # srun returns another exit code.
    job = submit("--resume", finished[0], task=None, CODE="143", WRITES=written)
    assert (job.code, job.is_requeued) == (code, is_requeued)


def test_a_job_without_a_new_checkpoint_is_requeued_three_times(submit, finished, tmp_path):
    folder, _ = finished

    def is_requeued():
        (tmp_path / "scontrol").unlink(missing_ok=True)
        return submit("--resume", folder, task=None, CODE="75").is_requeued

    def save(step):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    assert [is_requeued() for _ in range(4)] == [True] * 3 + [False]
    save(2)
    assert is_requeued()
    save(11)
    assert [is_requeued() for _ in range(4)] == [True] * 3 + [False]
    (tmp_path / "scontrol").unlink(missing_ok=True)
    job = submit("--resume", folder, task=None, CODE="75")
    assert "job 42 was requeued three times without a new checkpoint, and is not requeued again" in job.printed
