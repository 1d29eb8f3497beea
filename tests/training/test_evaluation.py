"""Evaluation between steps: every rank has the gathered model, and training is not affected."""

import json
from pathlib import Path

import pytest

from forked import launched, run_script

WORKER = Path(__file__).with_name("evaluation_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_evaluate_on_their_own_under_zero3_and_train_on_as_if_they_had_not():
    ended = run_script(WORKER, environments=launched(2))
    assert ended.codes == [0, 0], ended.text()
    found = json.loads(next(line for line in ended.printed[0].splitlines() if line.startswith("{")))
    assert found["differ"] == []
    assert found["is_training"] == [True, True]
    # both ranks have the same documents and the same gathered model
    assert found["texts"][0] == found["texts"][1]
    # parameters are partitioned again afterwards
    assert all(size == 0 for sizes in found["sizes"] for size in sizes)
