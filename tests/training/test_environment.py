"""A process finds its place, whatever started it, and the terminal is not littered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recurrent_bart.training.environment import launched_rank, use_bf16

WORKER = str(Path(__file__).with_name("environment_worker.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(command, tmp_path, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment |= {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [*command, WORKER, str(tmp_path / "model")], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_rank_is_the_launchers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3


@pytest.mark.distributed
@pytest.mark.parametrize(("command", "world_size"), [([sys.executable], 1), (TORCHRUN, 2)], ids=["alone", "torchrun"])
def test_processes_join_without_a_gpu_and_without_noise(tmp_path, command, world_size):
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "rank": 0,
        "local_rank": 0,
        "world_size": world_size,
        "device": "cpu",
        "backend": "gloo",
        "gathered": world_size,
        "set": ["MASTER_PORT", "RANK"],
    }
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "Writing model shards" not in done.stderr
    assert "FutureWarning" not in done.stderr


@pytest.mark.distributed
def test_half_of_a_launchers_settings_are_refused(tmp_path):
    done = start([sys.executable], tmp_path, RANK="0", WORLD_SIZE="1")
    assert done.returncode == 1
    assert "error: RANK is set in the environment, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not" in done.stderr


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
    with pytest.raises(ValueError, match="--precision bf16: this GPU does not have it, use fp32"):
        use_bf16("bf16", torch.device("cuda"))
