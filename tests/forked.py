"""Scripts in processes of their own, forked from one that has imported what they need.

Started anew, a process imports for several seconds before it does what takes a second or two here.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# as multiprocessing, but functions within functions can be sent too
import multiprocess
import torch

import launching
from recurrent_bart.training import session as experiment

# a process that has no threads: forked from one that may have some, others could wait for ever for a lock that one held
SERVER = multiprocess.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        __name__,
        "recurrent_bart.cluster.verdict",
        "recurrent_bart.studies.documents.training",
        "recurrent_bart.studies.documents.report",
        "recurrent_bart.benchmarks.models.session",
        "recurrent_bart.probes.memory_map",
        "recurrent_bart.report.page",
        # half of the time that an engine takes to be built
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)
# how a process is started by hand
ALONE = ({},)


@dataclass
class Ended:
    """What processes have left: exit codes (-9: killed), and what each of them printed."""

    codes: list[int]
    printed: list[str]

    def text(self):
        return "\n".join(self.printed)


def start(function, *arguments):
    """A process that calls a function, by the name of its module or with what it refers to."""
    with _environment():
        process = SERVER.Process(target=_alone, args=(function, *arguments))
        process.start()
    return process


def launched(n_processes):
    """What a launcher tells each of several processes on this machine."""
    place = {"WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launching.free_port()}
    return [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in range(n_processes)]


def run_script(script, *arguments, environments=ALONE, firsts=None, timeout=270, ends_when=None, folder=None, stdin=""):
    """Run a script's `__main__` until all processes have ended.

    Args:
        script: Its file.
        arguments: Its command line.
        environments: For each process, what is in its environment beside that of `launching.environment`.
        firsts: For each process, what it calls before.
        timeout: Seconds after which those left are killed, and the test fails.
        ends_when: Once these processes have ended, the others are killed: they hang on purpose.
        folder: Where they work; this checkout if it is not given.
        stdin: File that they read.
    """
    argv = [str(launching.TESTS.parent / script), *map(str, arguments)]
    given = [{name: str(value) for name, value in place.items()} for place in environments]
    place, end = folder or launching.TESTS.parent, time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as logs:
        files = [Path(logs, str(number)) for number in range(len(given))]
        processes = [
            start(_run, argv, *own, place, stdin or os.devnull)
            for own in zip(given, files, firsts or [None] * len(given), strict=True)
        ]
        waited_for = [processes[number] for number in ends_when] if ends_when else processes
        for process in waited_for:
            process.join(max(0.1, end - time.monotonic()))
        hanging = [number for number, process in enumerate(processes) if process in waited_for and process.is_alive()]
        for process in processes:
            _end(process)
        ended = Ended([process.exitcode for process in processes], [file.read_text() for file in files])
    assert not hanging, f"process {hanging} had not ended after {timeout} s\n{ended.text()}"
    return ended


def _end(process):
    """Kill it if it is there, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


@contextlib.contextmanager
def _environment():
    """What the fork server is started with and hands on, and where a process finds the modules of tests."""
    before, path = dict(os.environ), sys.path[:]
    sys.path.append(str(launching.TESTS.parent))
    os.environ.update(launching.environment())
    for name in launching.LAUNCHED:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(before)


def _alone(function, *arguments):
    os.setsid()
    # the threads of the process that was forked are not here
    torch.set_num_threads(1)
    # of the processes that it starts in turn, as where it is started by a launcher
    multiprocessing.set_start_method("fork", force=True)
    function(*arguments)


def _run(argv, variables, log, first, place, stdin):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.environ.update(variables)
    os.chdir(place)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    # half of the time of a short run, and tested elsewhere
    experiment.draw_curves = lambda records, path: None
    if first:
        first()
    with open(stdin) as sys.stdin:
        runpy.run_path(argv[0], run_name="__main__")
