"""An evaluation between steps, with the model whole on every process, leaves no trace in training."""

import json
from pathlib import Path

import pytest

from launching import torchrun

WORKER = Path(__file__).with_name("evaluation_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_evaluate_on_their_own_under_zero3_and_train_on_as_if_they_had_not():
    code, output = torchrun(2, WORKER)
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert found["differ"] == []
    assert found["is_training"] == [True, True]
    # the same documents and the same whole model
    assert found["texts"][0] == found["texts"][1]
    # and given back in parts afterwards
    assert all(size == 0 for sizes in found["sizes"] for size in sizes)
