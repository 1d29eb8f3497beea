"""Asked to stop, a run ends between two steps with a whole checkpoint and exit code 75, whichever process was asked."""

import signal

import pytest

STOPPED = 75
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_process_in_a_step_stops_all_after_it(run, name, rank):
    ended = run.train(fault="signalled", ranks=[rank], moment="step", number=getattr(signal, name), at=3)
    assert ended.codes == [STOPPED, STOPPED], ended.text()
    # the evaluation after the second wrote one too
    assert run.steps() == [2, 3]
    assert f"stopped    after step 3: {name}" in ended.printed[0]
    assert f"go on with --resume {run.folder}" in ended.printed[0]
    assert ended.printed[1] == ""
    assert run.outcome() == {"code": STOPPED, "reason": name, "step": 3}
