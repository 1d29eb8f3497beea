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
def test_a_killed_process_ends_the_other_process(run, moment, at, steps):
    ended = run.train(fault="killed", moment=moment, at=at)
    assert ended.codes == [FAULT, KILLED], ended.text()
    assert GONE.format(0) in ended.printed[0]
    assert "Traceback" not in ended.printed[0]
    assert run.steps() == steps
    assert run.outcome()["code"] == FAULT
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()
    assert "resumed    after step 2" in ended.printed[0]


def test_a_killed_rank_0_ends_the_other_process(run):
    ended = run.train(fault="killed", ranks=[0], moment="step", at=4)
    assert ended.codes == [KILLED, FAULT], ended.text()
    assert GONE.format(1) in ended.printed[1]
    assert run.steps() == [2]


def test_a_process_that_hangs_in_a_step_ends_the_run_after_the_step_timeout(run):
    changes = {"step_timeout_seconds": 3}
    ended = run.train(fault="hangs", moment="step", at=4, changes=changes, ends_when=[0], timeout=60)
    assert ended.codes == [FAULT, KILLED], ended.text()
    assert GONE.format(0) in ended.printed[0]
    assert run.steps() == [2]


@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_the_step_timeout_does_not_end_slow_work_outside_of_steps(run, moment):
    changes = {"step_timeout_seconds": 2, "max_steps": 3}
    ended = run.train(fault="hangs", moment=moment, seconds=5, changes=changes)
    assert ended.codes == [DONE, DONE], ended.text()


@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
def test_an_unexpected_error_is_printed_once_with_its_rank(run, moment):
    ended = run.train(fault="fails", moment=moment, at=2)
    assert ended.codes == [FAULT, FAULT], ended.text()
    assert "fault on rank 1: Traceback" in ended.printed[1]
    assert ended.text().count("RuntimeError: nobody foresaw this") == 1
    assert GONE.format(0) in ended.printed[0]
    assert run.steps() == ([] if moment == "step" else [2])


def test_a_killed_data_loader_process_ends_the_run(run):
    ended = run.train(1, fault="worker_killed", ranks=[0], changes={"dataloader_num_workers": 1, "max_steps": 50})
    assert ended.codes == [FAULT], ended.text()
    assert "fault on rank 0: a data loader process has ended" in ended.text()
