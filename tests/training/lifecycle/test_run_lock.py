"""Run lock: one run at a time trains in a folder; the lock of a dead process is taken over."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from recurrent_bart.training.lifecycle import run_lock
from recurrent_bart.training.lifecycle.run_lock import Holder, RunLock, RunLockLostError


def holder(job="", n_restarts=0, **changes):
    return dataclasses.replace(Holder.here(job, n_restarts), **changes)


def write_lock(folder, content, age=0.0):
    """Write the lock file of another process, last renewed some seconds ago."""
    text = content if isinstance(content, str) else json.dumps(dataclasses.asdict(content))
    (folder / "lock").write_text(text)
    renewed = time.time() - age
    os.utime(folder / "lock", (renewed, renewed))


@pytest.fixture
def lock(tmp_path):
    """Yield a lock of this process, and release it at the end."""
    own = RunLock(tmp_path, holder())
    yield own
    own.release()


@pytest.fixture
def _fast(monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.05)


def test_a_lock_is_a_file_while_it_is_held(lock, tmp_path):
    lock.acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_refused_and_told_who_holds_it(lock, tmp_path):
    lock.acquire()
    with pytest.raises(ValueError, match=f"another run uses this folder \\(process {os.getpid()} on "):
        RunLock(tmp_path, holder()).acquire()
    assert json.loads((tmp_path / "lock").read_text())["token"] == lock.holder.token


def _fork(folder, start):
    """Fork a process that takes the lock at a given time and holds it; it exits with 2 if it is refused."""
    child = os.fork()
    if child:
        return child
    try:
        time.sleep(max(0.0, start - time.time()))
        RunLock(folder, holder()).acquire()
        time.sleep(3)
    except ValueError:
        os._exit(2)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("is_left_over", [False, True], ids=["free", "lock of a dead process"])
def test_of_many_processes_that_begin_together_one_has_the_lock(tmp_path, is_left_over):
    if is_left_over:
        write_lock(tmp_path, holder(pid=ended_process()))
    start, n_processes = time.time() + 0.3, 6
    children = [_fork(tmp_path, start) for _ in range(n_processes)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0] + [2] * (n_processes - 1)


def ended_process():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("started", [None, -100.0], ids=["ended", "its id is another process's"])
def test_a_process_of_this_machine_that_is_gone_holds_nothing(lock, tmp_path, started):
    gone = holder(pid=ended_process()) if started is None else holder(started=started)
    write_lock(tmp_path, gone)
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began < 5
    assert json.loads((tmp_path / "lock").read_text())["token"] == lock.holder.token


def test_a_lock_that_another_process_has_just_taken_over_is_not_taken_from_it(lock, tmp_path, monkeypatch):
    write_lock(tmp_path, holder(pid=ended_process()))
    winner, folder_lock = holder(), run_lock._folder_lock

    def beaten(folder):
        # between the look at the dead process and the replacement of its lock
        write_lock(folder, winner)
        return folder_lock(folder)

    monkeypatch.setattr(run_lock, "_folder_lock", beaten)
    with pytest.raises(ValueError, match="another run uses this folder"):
        lock.acquire()
    assert json.loads((tmp_path / "lock").read_text())["token"] == winner.token


def test_a_killed_process_that_nobody_has_waited_for_holds_nothing(lock, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = run_lock.psutil.Process(killed.pid).create_time()
    write_lock(tmp_path, holder(pid=killed.pid, started=started))
    with pytest.raises(ValueError, match="another run uses this folder"):
        lock.acquire()
    killed.kill()
    while run_lock.psutil.Process(killed.pid).status() != run_lock.psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    lock.acquire()
    killed.wait()


@pytest.mark.parametrize("changed", ["host", "start of the host", "process namespace"])
def test_process_ids_are_compared_only_where_they_mean_the_same(monkeypatch, changed):
    before = holder()
    assert before.is_gone(holder()) is False
    if changed == "host":
        monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "node7")
    elif changed == "start of the host":
        monkeypatch.setattr(run_lock.Path, "read_text", lambda path: "another boot id\n")
    else:
        monkeypatch.setattr(run_lock.os, "readlink", lambda path: "pid:[1]")
    for pid in (before.pid, ended_process()):
        assert dataclasses.replace(before, pid=pid).is_gone(holder()) is None


ELSEWHERE = {"host": "node7", "machine": "node7", "pid": 1}


@pytest.mark.usefixtures("_fast")
class TestAnotherHost:
    def test_a_lock_that_was_not_renewed_for_long_is_taken_over_after_two_renewals(self, lock, tmp_path):
        write_lock(tmp_path, holder(**ELSEWHERE), age=100)
        began = time.monotonic()
        lock.acquire()
        assert time.monotonic() - began < 0.5
        assert json.loads((tmp_path / "lock").read_text())["host"] == lock.holder.host

    def test_a_lock_that_a_host_with_a_slow_clock_renews_is_refused(self, lock, tmp_path):
        other = holder(**ELSEWHERE)
        write_lock(tmp_path, other, age=100)
        renewal = threading.Timer(0.05, lambda: write_lock(tmp_path, other, age=99))
        renewal.start()
        with pytest.raises(ValueError, match="process 1 on node7"):
            lock.acquire()
        renewal.join()

    def test_a_lock_that_stands_still_is_taken_over_after_a_while(self, tmp_path):
        write_lock(tmp_path, holder(**ELSEWHERE))
        said = []
        own = RunLock(tmp_path, holder(), say=said.append)
        own.acquire()
        own.release()
        assert len(said) == 1
        assert "process 1 on node7" in said[0]

    def test_a_lock_that_is_renewed_meanwhile_is_refused(self, tmp_path):
        other = RunLock(tmp_path, holder(**ELSEWHERE))
        other.acquire()
        with pytest.raises(ValueError, match="process 1 on node7"):
            RunLock(tmp_path, holder()).acquire()
        other.release()

    def test_a_lock_that_is_released_meanwhile_is_free(self, lock, tmp_path):
        other = RunLock(tmp_path, holder(**ELSEWHERE))
        other.acquire()
        other.say = None
        lock.say = lambda text: other.release()
        lock.acquire()
        assert json.loads((tmp_path / "lock").read_text())["token"] == lock.holder.token

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
    def test_a_lock_that_was_cut_off_is_taken_over_after_a_while(self, lock, tmp_path, content):
        write_lock(tmp_path, content)
        lock.acquire()
        assert lock.is_held


@pytest.mark.parametrize(
    ("job", "n_restarts", "is_free"), [("40", 1, True), ("40", 0, False), ("41", 1, False)], ids=str
)
def test_a_job_that_comes_back_on_other_nodes_takes_its_own_lock_at_once(
    tmp_path, monkeypatch, job, n_restarts, is_free
):
    waited = []
    monkeypatch.setattr(RunLock, "_now", lambda own: waited.append(own) or time.time())
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.05)
    write_lock(tmp_path, holder(job="40", machine="node7"))
    own = RunLock(tmp_path, holder(job, n_restarts))
    own.acquire()
    own.release()
    assert bool(waited) is not is_free


@pytest.mark.usefixtures("_fast")
def test_a_run_whose_lock_was_taken_over_ends_and_leaves_the_lock(lock, tmp_path):
    lock.acquire()
    lock.check()
    other = holder(host="node7", machine="node7")
    write_lock(tmp_path, other)
    time.sleep(0.5)
    with pytest.raises(RunLockLostError, match="another run has taken over this folder"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "lock").read_text())["token"] == other.token


@pytest.mark.usefixtures("_fast")
def test_a_lock_that_somebody_has_removed_is_there_again(lock, tmp_path):
    lock.acquire()
    (tmp_path / "lock").unlink()
    time.sleep(0.5)
    lock.check()
    assert json.loads((tmp_path / "lock").read_text())["token"] == lock.holder.token


def test_a_run_that_has_not_begun_leaves_no_folder_that_was_made_for_it(tmp_path):
    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    own = RunLock(folder, holder(), made=[folder, tmp_path / "a"])
    own.acquire()
    own.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lock: cannot be written"):
        RunLock(tmp_path / "missing", holder()).acquire()
