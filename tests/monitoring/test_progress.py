"""Progress bar on a terminal, plain lines in a file, nothing on other ranks."""

import io
import re

import pytest
from rich.console import Console

from recurrent_bart.monitoring import progress as module
from recurrent_bart.monitoring.progress import ProgressDisplay, clock, fill_lines, say

RECORD = {
    "step": 20,
    "loss": 2.3456,
    "tokens_per_second": 12_345.6,
    "model_flops_share": 0.3456,
    "memory_allocated_bytes": 3 * 2**29,
    "learning_rate": 3e-5,
    "seconds_left": 3725.0,
}
STATUS = "loss 2.346  12,346 tokens/s  35 % of peak  1.5 GiB  lr 3.0e-05"


def run(first_step=0, is_terminal=True, is_plain=False):
    """Return the output of a run of 40 steps after step 20."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=160, color_system=None, legacy_windows=False)
    with ProgressDisplay(first_step, 40, console, is_plain) as display:
        for step in range(first_step + 1, 21):
            display.step(step)
        display.show(RECORD)
        display.show({"step": 20, "validation_loss": 3.0})
        display.say("[bold] :smile: a line " + "that is long " * 20)
    return output.getvalue()


def test_the_bar_moves_and_shows_the_metrics():
    shown = run()
    assert "20/40" in shown
    assert STATUS in shown
    assert "━" in shown
    assert "left" in shown


@pytest.mark.parametrize(("seconds", "is_shown"), [(0.04, False), (0.06, True)])
def test_waiting_for_data_is_shown_above_the_threshold(seconds, is_shown, monkeypatch):
    monkeypatch.setitem(RECORD, "step_seconds", 1.0)
    monkeypatch.setitem(RECORD, "data_seconds", seconds)
    assert ("12,346 tokens/s  35 % of peak  6 % waiting for data  1.5 GiB" in run()) == is_shown


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_all_metrics_are_shown_in_a_narrow_terminal(width):
    record = {**RECORD, "step_seconds": 1.0, "data_seconds": 0.5}
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    with ProgressDisplay(0, 12_345, console) as display:
        display.show({"step": 20, "validation_loss": 3.0})
        display.show(record)
        display.step(6172)
        display.bar.refresh()
    # Keep the last state of the screen; earlier states are overwritten.
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue().split("\r")[-1])
    screen = [line.rstrip() for line in text.splitlines()]
    assert all(len(line) <= width for line in screen)
    (bar,) = [line for line in screen if "6172/12345" in line]
    assert "━━━━" in bar
    assert re.search(r"left [-\d:]+$", bar)
    metrics = [*STATUS.split("  "), "50 % waiting for data", "validation 3.000"]
    assert all(any(metric in line for line in screen) for metric in metrics)


def test_the_bar_of_a_resumed_run_starts_at_its_step():
    output = io.StringIO()
    with ProgressDisplay(30, 40, Console(file=output, force_terminal=True, width=120)):
        pass
    assert "30/40" in output.getvalue()


def test_lines_are_printed_unchanged_and_unbroken():
    for is_terminal in (True, False):
        assert "[bold] :smile: a line " + "that is long " * 20 in run(is_terminal=is_terminal)


def test_plain_lines_are_printed_without_a_terminal():
    lines = run(is_terminal=False).splitlines()
    assert lines[0] == f"step 20/40  {STATUS}  left 1:02:05"
    assert len(lines) == 2


def test_a_batch_job_prints_plain_lines_even_in_a_terminal():
    assert run(is_plain=True).splitlines()[0] == f"step 20/40  {STATUS}  left 1:02:05"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_last_evaluation_stays_visible(is_terminal):
    output = io.StringIO()
    with ProgressDisplay(0, 40, Console(file=output, force_terminal=is_terminal, width=160)) as display:
        for step, loss in ((10, 3.0), (20, 2.5)):
            display.show({"step": step, "validation_loss": loss})
        display.show(RECORD)
    assert f"{STATUS}  validation 2.500" in output.getvalue()


def test_the_bar_shows_an_evaluation_after_the_last_step():
    output = io.StringIO()
    with ProgressDisplay(0, 40, Console(file=output, force_terminal=True, width=160)) as display:
        display.show(RECORD)
        display.show({"step": 40, "validation_loss": 2.5})
    assert f"{STATUS}  validation 2.500" in output.getvalue()


def test_unknown_metrics_are_left_out():
    output = io.StringIO()
    unknown = {"model_flops_share", "memory_allocated_bytes"}
    with ProgressDisplay(0, 40, Console(file=output, force_terminal=False, width=160)) as display:
        display.show({name: value for name, value in RECORD.items() if name not in unknown})
    assert output.getvalue() == "step 20/40  loss 2.346  12,346 tokens/s  lr 3.0e-05  left 1:02:05\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_only_rank_0_prints(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(module, "is_first", lambda: False)
    assert run(is_terminal=is_terminal) == ""
    say("nothing")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations_are_formatted(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(("width", "expected"), [(8, ["aaa  bbb", "c"]), (7, ["aaa", "bbb  c"]), (11, ["aaa  bbb  c"])])
def test_a_line_is_filled_to_its_last_column(width, expected):
    assert fill_lines(["aaa", "bbb", "c"], width) == expected
