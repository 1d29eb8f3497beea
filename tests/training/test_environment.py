"""Environment of a process under each launcher, and a terminal without library messages."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from forked import launched, run_script
from launching import LAUNCHED, forks, run
from recurrent_bart.training.environment import (
    Environment,
    Rendezvous,
    batch_job,
    is_batch_job,
    launched_rank,
    launched_rendezvous,
    start_processes,
    use_bf16,
)

WORKER = Path(__file__).with_name("environment_worker.py")


def test_the_rank_is_the_launchers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3


# variables of the third of two processes on each of two hosts, counted from 0
THIRD = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "alpha", "MASTER_PORT": "12345"}


def test_each_variable_of_the_launcher_is_read_as_what_it_is(monkeypatch):
    for name, value in THIRD.items():
        monkeypatch.setenv(name, value)
    assert launched_rendezvous() == Rendezvous(3, 1, 4, "alpha", 12345)


def test_without_a_launcher_one_process_meets_itself_at_a_port_of_its_own(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    found = launched_rendezvous()
    assert (found.rank, found.local_rank, found.world_size, found.address) == (0, 0, 1, "127.0.0.1")
    assert 1024 <= found.port < 65_536
    # DeepSpeed and PyTorch read the same values
    assert {name: os.environ[name] for name in THIRD} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(found.port),
    }


def test_a_process_takes_the_gpu_of_its_rank_on_the_host(monkeypatch):
    for name, value in THIRD.items():
        monkeypatch.setenv(name, value)
    chosen, joined = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("deepspeed.init_distributed", lambda *given, **how: joined.append((given, how)))
    found = start_processes(timeout_minutes=7)
    assert found == Environment(3, 1, 4, torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)]
    assert joined == [(("nccl",), {"timeout": timedelta(minutes=7), "verbose": False})]


@pytest.mark.parametrize(
    ("variables", "is_job", "job"),
    [
        ({}, False, ("", 0)),
        ({"SLURM_JOB_ID": "42"}, True, ("42", 0)),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": ""}, True, ("42", 0)),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}, True, ("42", 3)),
    ],
    ids=str,
)
def test_a_batch_job_has_its_number_and_that_of_its_restarts(monkeypatch, variables, is_job, job):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_batch_job(), batch_job()) == (is_job, job)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_join_without_a_gpu_and_without_noise(tmp_path, world_size):
    """Start one new process, which may print while it imports, and fork two ranks."""
    folder, hidden = tmp_path / "model", {"CUDA_VISIBLE_DEVICES": ""}
    if world_size == 1:
        code, printed = run([sys.executable, WORKER, folder], timeout=120, **hidden)
    else:
        ended = run_script(WORKER, folder, environments=[place | hidden for place in launched(2)], timeout=120)
        code, printed = max(ended.codes), ended.text()
    assert code == 0, printed
    assert json.loads(next(line for line in printed.splitlines() if line.startswith("{"))) == {
        "rank": 0,
        "local_rank": 0,
        "world_size": world_size,
        "device": "cpu",
        "backend": "gloo",
        "gathered": world_size,
        "set": ["MASTER_PORT", "RANK"],
    }
    assert (folder / "model.safetensors").exists()
    assert "Writing model shards" not in printed
    assert "FutureWarning" not in printed


def test_half_of_a_launchers_settings_are_refused(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="RANK is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        start_processes(timeout_minutes=1)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        ("fp32", "cuda", True, False),
        ("bf16", "cuda", True, True),
        ("bf16", "cpu", False, True),
    ],
)
def test_bf16_where_it_is_fast_unless_told_otherwise(monkeypatch, precision, device, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert use_bf16(precision, torch.device(device)) == expected


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="--precision bf16: this GPU does not support bf16; use --precision fp32"):
        use_bf16("bf16", torch.device("cuda"))


@pytest.mark.slow
def test_without_a_gpu_deepspeed_prints_nothing_before_us():
    """Run both scripts in forks of a new process that has imported what they need except DeepSpeed."""
    commands = [({}, [f"launch/{script}.py", "--zzz"]) for script in ("train", "evaluate")]
    command = forks(commands, ("datasets", "matplotlib.axes", "transformers.models.bart.modeling_bart"), "deepspeed", 2)
    code, printed = run(["env", "-u", "DS_ACCELERATOR", *command], timeout=120)
    assert code == 0, printed
    assert printed.splitlines() == ["error: unknown argument --zzz"] * 2
