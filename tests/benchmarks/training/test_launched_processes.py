"""Processes end, and failures report the last lines of the output."""

import os
import signal
import sys
import threading

import psutil
import pytest

from recurrent_bart.benchmarks.training import launched_processes
from recurrent_bart.benchmarks.training.launched_processes import last_output_lines, run_process
from recurrent_bart.training.lifecycle.interruption import handling_signals

PRINTED = """[2026-11-26 21:15:12,045] [WARNING] [real_accelerator.py:213:get_accelerator] Setting accelerator to CPU.
W1126 21:15:28.1 17920 torch/distributed/run.py:1028] a remark
step 1
error: --deepspeed: wrong
error: --deepspeed: wrong
W1126 21:15:28.4 17920 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 17927
E1126 21:15:28.5 17920 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2) local_rank: 0
Traceback (most recent call last):
============================================================
"""


def test_what_a_command_prints_is_kept(tmp_path):
    run_process([sys.executable, "-c", "print('said')"], tmp_path / "log", timeout_seconds=60)
    assert (tmp_path / "log").read_text() == "said\n"


def test_one_that_fails_is_told_of_with_its_last_lines(tmp_path):
    program = "print('first', 'second', 'third', 'fourth', sep='\\n'); exit(3)"
    with pytest.raises(RuntimeError, match=r"^exit code 3: second \| third \| fourth$"):
        run_process([sys.executable, "-c", program], tmp_path / "log", timeout_seconds=60)


def test_one_that_takes_too_long_is_asked_to_end(tmp_path):
    with pytest.raises(RuntimeError, match=r"^time limit of 0\.5 s reached: begun$"):
        run_process(["bash", "-c", "echo begun; exec sleep 99"], tmp_path / "log", timeout_seconds=0.5)
    assert not any(child.name() in ("bash", "sleep") for child in psutil.Process().children())


def test_one_that_does_not_listen_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launched_processes, "GRACE_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"^time limit of"):
        run_process(["bash", "-c", "trap '' TERM; sleep 2"], tmp_path / "log", timeout_seconds=0.3)
    assert not any(child.name() == "bash" for child in psutil.Process().children())


def test_torchruns_own_report_hides_nothing():
    assert last_output_lines(PRINTED) == "step 1 | error: --deepspeed: wrong"
    assert last_output_lines("E1126 x torch/distributed/run.py:1] all there is\n").endswith("all there is")


def test_whoever_is_asked_to_end_ends_what_it_started(tmp_path):
    def leave(*_):
        raise SystemExit

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with handling_signals(leave), pytest.raises(SystemExit):
        run_process(["sleep", "99"], tmp_path / "log", timeout_seconds=30)
    assert not any(child.name() in ("bash", "sleep") for child in psutil.Process().children())
