"""`slurm/train.sh` finds the run folder in each spelling of the flags of launch/train.py; no cluster is needed."""

import subprocess

import pytest

from launching import TESTS, environment

# Stand-ins for SLURM's programs: scontrol names the node, and srun prints the command's last two words.
PROGRAMS = {"scontrol": "echo localhost", "srun": 'echo "${@: -2}"'}


@pytest.fixture
def started(tmp_path):
    """Return a function that calls the script in an empty folder and returns the last two words of the command."""
    (tmp_path / "slurm").symlink_to(TESTS.parent / "slurm")
    (tmp_path / "bin").mkdir()
    for name, line in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "localhost"}
    variables = environment(**job)
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"

    def call(*flags, **more):
        command = ["bash", "slurm/train.sh", *flags]
        ended = subprocess.run(command, cwd=tmp_path, env=variables | more, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    return call


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir", "--resume"])
@pytest.mark.parametrize("separator", [" ", "="])
def test_the_given_folder_holds_the_run_and_its_caches(flag, separator, started, tmp_path):
    assert started(*f"{flag}{separator}runs/mine".split(" ")) == f"{flag} runs/mine"
    assert (tmp_path / "runs" / "mine" / "caches").is_dir()
    assert not (tmp_path / "runs" / "slurm-7").exists()


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir"])
def test_each_array_task_has_a_separate_folder(flag, started):
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "3"}
    assert started(flag, "runs/mine", **task) == f"{flag} runs/mine/3"


def test_without_a_flag_the_folder_is_named_after_the_job(started):
    assert started() == "--output_dir runs/slurm-7"
