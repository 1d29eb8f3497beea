"""Lock of a run folder: all processes of a second run fail, but a killed run leaves no lock."""

import pytest

from recurrent_bart.training.lifecycle.exit_codes import ExitCode
from recurrent_bart.training.lifecycle.run_lock import Holder, RunLock

DONE, MISTAKE, KILLED = ExitCode.DONE, ExitCode.MISTAKE, -9
pytestmark = pytest.mark.distributed


def test_all_ranks_of_a_second_run_end_and_one_prints_the_reason(run):
    run.folder.mkdir()
    lock = RunLock(run.folder, Holder.here("", 0))
    lock.acquire()
    ended = run.train()
    lock.release()
    assert ended.codes == [MISTAKE, MISTAKE], ended.text()
    assert ended.text().count("another run uses this folder (process") == 1
    assert not ended.printed[1]
    assert list(run.folder.iterdir()) == []


def test_a_killed_run_can_be_resumed_at_once(run):
    ended = run.train(fault="killed", ranks=[0, 1], moment="step", at=4)
    assert ended.codes == [KILLED, KILLED], ended.text()
    assert (run.folder / "lock").exists()
    ended = run.resume(timeout=50)
    assert ended.codes == [DONE, DONE], ended.text()
    assert "resumed    after step 2" in ended.printed[0]
    assert not (run.folder / "lock").exists()
