"""A run that is cut off and resumed ends with the same bits as one that is not."""

import json
from pathlib import Path

import pytest
import torch

from launching import torchrun
from training.resume_worker import run_all

WORKER = Path(__file__).with_name("resume_worker.py")
# how long something took, and on how much memory, is no result
TIMES = ("_per_second", "_per_second_per_device", "_seconds", "_left", "_share", "_bytes", "est_rank")


@pytest.fixture(scope="module")
def two_processes(documents, tmp_path_factory):
    output = tmp_path_factory.mktemp("resume")
    code, printed = torchrun(2, WORKER, documents, output)
    assert code == 0, printed
    return output


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)} for line in lines]


def tensors(item, path=""):
    """All tensors inside what torch.save wrote, by where they stand."""
    if torch.is_tensor(item):
        yield path, item
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from tensors(value, f"{path}/{key}")
    elif isinstance(item, (list, tuple)):
        for place, value in enumerate(item):
            yield from tensors(value, f"{path}/{place}")


def saved_tensors(run):
    last = run / "checkpoints" / "step-00000006"
    files = sorted(last.rglob("*.pt"))
    assert files
    return {
        f"{file.relative_to(last)}{path}": tensor
        for file in files
        for path, tensor in tensors(torch.load(file, weights_only=False))
    }


def check_equal(output, n_processes):
    whole, resumed = output / "whole", output / "resumed"
    assert metrics(resumed) == metrics(whole)
    assert [record["step"] for record in metrics(whole) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    found, expected = saved_tensors(resumed), saved_tensors(whole)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    # weights, both moments of each, and random states of every process were among them
    assert sum("exp_avg" in name for name in expected) >= 2 * n_processes
    assert sum(name.startswith("rng-") for name in expected) == n_processes
    assert (resumed / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_equals_one_that_was_never_cut_off(alone, documents, tmp_path, stage):
    run_all(alone, documents, tmp_path, stage)
    check_equal(tmp_path, n_processes=1)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_of_two_processes_equals_one_that_was_never_cut_off(two_processes, stage):
    check_equal(two_processes / f"zero{stage}", n_processes=2)
    # what one process draws is not what the other draws
    states = [
        torch.load(two_processes / f"zero{stage}" / "whole" / "checkpoints" / "step-00000006" / f"rng-{rank}.pt")["cpu"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*states)
