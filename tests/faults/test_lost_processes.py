"""One process dies, hangs or fails: the remaining ones end soon, and the last checkpoint is complete."""

import pytest

from recurrent_bart.training.lifecycle.exit_codes import ExitCode

DONE, FAULT, KILLED = ExitCode.DONE, ExitCode.FAULT, -9
pytestmark = pytest.mark.distributed
GONE = "fault on rank {}: another process has ended or does not answer"


@pytest.mark.parametrize(
    ("moment", "at", "steps"),
    [("step", 4, [2]), ("evaluation", 2, [2]), ("save", 2, [2])],
    ids=["step", "evaluation", "save"],
)
def test_a_process_that_is_killed_ends_the_other(run, moment, at, steps):
    ended = run.train(fault="killed", moment=moment, at=at)
    assert ended.codes == [FAULT, KILLED], ended.text()
    assert GONE.format(0) in ended.printed[0]
    assert "Traceback" not in ended.printed[0]
    assert run.steps() == steps
    assert run.outcome()["code"] == FAULT
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()
    assert "resumed    after step 2" in ended.printed[0]


def test_the_first_process_may_be_the_one_that_is_killed(run):
    ended = run.train(fault="killed", ranks=[0], moment="step", at=4)
    assert ended.codes == [KILLED, FAULT], ended.text()
    assert GONE.format(1) in ended.printed[1]
    assert run.steps() == [2]


def test_a_process_that_hangs_in_a_step_is_not_waited_for_longer_than_the_step_timeout(run):
    changes = {"step_timeout_seconds": 3}
    ended = run.train(fault="hangs", moment="step", at=4, changes=changes, ends_when=[0], timeout=60)
    assert ended.codes == [FAULT, KILLED], ended.text()
    assert GONE.format(0) in ended.printed[0]
    assert run.steps() == [2]


@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_what_takes_long_beside_the_steps_is_not_cut_off(run, moment):
    changes = {"step_timeout_seconds": 2, "max_steps": 3}
    ended = run.train(fault="hangs", moment=moment, seconds=5, changes=changes)
    assert ended.codes == [DONE, DONE], ended.text()


@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
def test_an_error_that_nobody_foresaw_is_told_once_with_its_rank(run, moment):
    ended = run.train(fault="fails", moment=moment, at=2)
    assert ended.codes == [FAULT, FAULT], ended.text()
    assert "fault on rank 1: Traceback" in ended.printed[1]
    assert ended.text().count("RuntimeError: nobody foresaw this") == 1
    assert GONE.format(0) in ended.printed[0]
    assert run.steps() == ([] if moment == "step" else [2])


def test_a_process_that_makes_batches_and_is_killed_ends_the_run(run):
    ended = run.train(1, fault="worker_killed", ranks=[0], changes={"dataloader_num_workers": 1, "max_steps": 50})
    assert ended.codes == [FAULT], ended.text()
    assert "fault on rank 0: a data loader process has ended" in ended.text()
