"""Tests that a test leaves the environment, loggers and process group as it found them, or fails."""

import logging
import os

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.utils import groups

from process_state import ProcessState
from processes import run_in_processes


def test_environment_levels_and_types_are_restored(monkeypatch):
    monkeypatch.setenv("KEPT", "before")
    logger = logging.getLogger("recurrent_bart.test")
    logger.setLevel(logging.ERROR)
    state = ProcessState()
    os.environ |= {"KEPT": "after", "ADDED": "1"}
    logging.root.setLevel(logging.CRITICAL)
    logger.setLevel(logging.DEBUG)
    torch.set_default_dtype(torch.float64)
    state.restore()
    assert os.environ["KEPT"] == "before"
    assert "ADDED" not in os.environ
    assert logging.root.level == state.levels[""]
    assert logging.root.level != logging.CRITICAL
    assert logger.level == logging.ERROR
    assert torch.get_default_dtype() == torch.float32
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(dist, "still held the ended group"), (comm, "which later tests of this process use")],
    ids=["by torch", "by deepspeed"],
)
@pytest.mark.distributed
def test_a_test_that_ends_the_process_group_is_named_and_deepspeed_forgets_the_group(tmp_path, ends, expected):
    def work(rank):
        comm.init_distributed("gloo", verbose=False)
        groups._clone_world_group()
        state = ProcessState()
        before = state.lost_group()
        ends.destroy_process_group()
        return before, state.lost_group(), groups._WORLD_GROUP

    ((before, lost, held),) = run_in_processes(work, 1, tmp_path)
    assert before == ""
    assert expected in lost
    assert held is None


def test_every_test_is_checked(request):
    assert "_process_state" in request.fixturenames
