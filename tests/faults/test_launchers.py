"""Launchers receive a signal, as from a user or a cluster; the run saves a complete checkpoint before it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import launching
from recurrent_bart.training.lifecycle.exit_codes import ExitCode
from runs import flags

TRAIN = str(launching.TESTS.parent / "launch" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start(command, run, **variables):
    """Start a long run and wait until it has done some steps."""
    arguments = flags(run.documents, run.folder, max_steps=5000, warmup_steps=2, eval_every=2500)
    started = subprocess.Popen(
        [*command, TRAIN, *arguments],
        cwd=launching.TESTS.parent,
        env=launching.environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 200
    while time.monotonic() < end and started.poll() is None:
        if (run.folder / "metrics.jsonl").exists() and len(run.losses()) >= 2:
            return started
        time.sleep(0.3)
    os.killpg(started.pid, signal.SIGKILL)
    raise AssertionError(started.communicate()[0])


def end_of(started):
    try:
        printed, _ = started.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise AssertionError(f"not over\n{started.communicate()[0]}") from None
    return started.returncode, printed


def assert_stopped(run, printed):
    outcome = json.loads((run.folder / "outcome.json").read_text())
    assert outcome["code"] == ExitCode.STOPPED, printed
    assert run.steps() == [outcome["step"]]


def test_python_stopped_by_a_signal_leaves_an_undamaged_checkpoint(run):
    started = start([sys.executable], run)
    started.send_signal(signal.SIGUSR1)
    code, printed = end_of(started)
    assert code == ExitCode.STOPPED
    assert_stopped(run, printed)


def test_torchrun_stopped_by_a_signal_leaves_an_undamaged_checkpoint(run):
    started = start(TORCHRUN, run)
    started.send_signal(signal.SIGTERM)
    code, printed = end_of(started)
    # The launcher replaces the exit codes of its processes by its own.
    assert code not in (0, ExitCode.STOPPED)
    assert_stopped(run, printed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_deepspeed_stopped_by_a_signal_leaves_an_undamaged_checkpoint(run, name):
    started = start(["deepspeed", "--master_port", str(launching.free_port())], run, LOCAL_SIZE="2")
    # Signal the whole process group, as a terminal and a cluster do. A signal to the launcher only would
    # orphan its processes.
    os.killpg(started.pid, getattr(signal, name))
    code, printed = end_of(started)
    assert code != 0
    assert_stopped(run, printed)
