"""Requests to stop: signals, stop file and time limit; one vote is enough."""

import os
import queue
import signal

import pytest

from recurrent_bart.training.lifecycle import interruption
from recurrent_bart.training.lifecycle.exit_codes import ExitCode, Outcome, code_of
from recurrent_bart.training.lifecycle.interruption import REASONS, Interrupted, Interruption, ignore_signals
from recurrent_bart.training.lifecycle.spikes import FEWEST, SpikeWatch


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    asked, before = Interruption(), signal.getsignal(number)
    with asked.watching():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    with pytest.raises(Interrupted, match=f"^{number.name}$"):
        asked.obey(asked.votes())


def test_a_signal_is_told_at_once_and_once():
    """Report a signal while the step still runs; the step itself reads `told`."""
    told = queue.Queue()
    asked = Interruption(on_signal=told.put)
    with asked.watching():
        for number in [signal.SIGINT] * 10 + [signal.SIGTERM]:
            os.kill(os.getpid(), number)
        assert [told.get(timeout=10) for _ in range(2)] == ["SIGINT", "SIGTERM"]
        # the signal still asks to stop
        assert sum(asked.votes()) == 2
    assert told.empty()


def test_a_file_and_the_clock_ask_too(tmp_path, monkeypatch):
    asked = Interruption(tmp_path / "stop", max_minutes=5)
    monkeypatch.setattr(interruption, "minutes_since_start", lambda: 4.9)
    asked.ask()
    (tmp_path / "stop").touch()
    with pytest.raises(Interrupted, match="the stop file"):
        asked.ask()
    (tmp_path / "stop").unlink()
    monkeypatch.setattr(interruption, "minutes_since_start", lambda: 5.1)
    with pytest.raises(Interrupted, match="--max_minutes"):
        asked.ask()


def test_the_vote_of_another_process_is_obeyed():
    asked = Interruption()
    assert len(asked.votes()) == len(REASONS)
    assert not any(asked.votes())
    with pytest.raises(Interrupted, match="SIGUSR1"):
        asked.obey([0.0, 3.0, 0.0, 0.0, 1.0])


def test_a_process_that_makes_batches_ignores_signals():
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    try:
        ignore_signals(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in interruption.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, ExitCode.DONE),
        (Interrupted("SIGTERM"), ExitCode.STOPPED),
        (ValueError("a flag"), ExitCode.MISTAKE),
        (OSError("no space"), ExitCode.FAULT),
        (KeyError("nobody foresaw this"), ExitCode.FAULT),
    ],
)
def test_an_outcome_has_the_code_of_what_ended_it(error, code):
    assert code_of(error) == code
    assert Outcome.of(error, 3).fields()["code"] == code


def test_a_loss_is_far_above_when_it_is_twice_the_median_and_half_a_nat_more():
    watch = SpikeWatch()
    lines = [{"step": step, "loss": 1.0} for step in range(FEWEST)]
    assert not any(watch.warning(line) for line in lines)
    assert watch.warning({"step": 8, "loss": 1.9}) is None
    assert watch.warning({"step": 9, "loss": 2.1}) == "step 9: the loss is 2.1, the median of earlier losses is 1"
    assert watch.n_in_row == 1
    # a log line without a loss: all of its steps were skipped
    assert watch.warning({"step": 10}) is None
    assert watch.warning({"step": 11, "loss": 1.1}) is None
    assert watch.n_in_row == 0


def test_near_zero_a_multiple_is_no_spike_and_at_first_nothing_is():
    watch = SpikeWatch()
    assert not any(watch.warning({"step": step, "loss": loss}) for step, loss in enumerate((0.01, 9.0, 0.01)))
    for step in range(FEWEST):
        watch.warning({"step": step, "loss": 0.01})
    assert watch.warning({"step": 20, "loss": 0.3}) is None
