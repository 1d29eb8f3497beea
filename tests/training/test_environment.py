"""Environment of a process under each launcher, and a terminal without library messages."""

import json
import sys
from pathlib import Path

import pytest
import torch

from forked import launched, run_script
from launching import LAUNCHED, run
from recurrent_bart.training.environment import launched_rank, start_processes, use_bf16

WORKER = Path(__file__).with_name("environment_worker.py")


def test_the_rank_is_the_launchers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3


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
    with pytest.raises(ValueError, match="RANK is set in the environment, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
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
    with pytest.raises(ValueError, match="--precision bf16: this GPU does not have it, use fp32"):
        use_bf16("bf16", torch.device("cuda"))


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_without_a_gpu_deepspeed_prints_nothing_before_us(script):
    command = ["env", "-u", "DS_ACCELERATOR", sys.executable, f"launch/{script}.py", "--no_such_flag"]
    code, printed = run(command, timeout=120)
    assert code == 2
    assert printed.splitlines() == ["error: unknown argument --no_such_flag"]
