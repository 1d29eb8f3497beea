"""Scripts in processes that are forked from a server with all imports done.

A new process would import for several seconds before a run of one or two seconds.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# like multiprocessing, but it can pickle nested functions
import multiprocess
import torch

import launching
from recurrent_bart.training import session

# a server without threads: a fork of a process with threads could wait forever for a lock that one of them held
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
        "recurrent_bart.commands.train",
        "recurrent_bart.commands.evaluate",
        "recurrent_bart.commands.summarize",
        # importing it takes half of the time that building an engine takes
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)
# environment of a single process without a launcher
ALONE = ({},)


@dataclass
class Ended:
    """Results of processes: exit codes (-9: killed) and printed output of each."""

    codes: list[int]
    printed: list[str]

    def text(self):
        return "\n".join(self.printed)


def start(function, *arguments):
    """Start a process that calls a function, pickled by its module's name or with the objects it refers to."""
    with _environment():
        process = SERVER.Process(target=_alone, args=(function, *arguments))
        process.start()
    return process


def launched(n_processes):
    """Return the environment variables that a launcher sets for each of several processes on this machine."""
    place = {"WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launching.free_port()}
    return [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in range(n_processes)]


def run_script(script, *arguments, environments=ALONE, firsts=None, timeout=270, ends_when=None, folder=None, stdin=""):
    """Run a script's `__main__` until all processes have ended.

    Args:
        script: File of the script.
        arguments: Command line arguments.
        environments: Environment variables of each process, added to `launching.environment`.
        firsts: Function that each process calls first.
        timeout: Seconds after which remaining processes are killed and the test fails.
        ends_when: Ranks after whose end the remaining processes are killed; these hang on purpose.
        folder: Working directory; by default this checkout.
        stdin: File for the standard input.
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
    """Kill a process, if it exists, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


@contextlib.contextmanager
def _environment():
    """Set the environment of the fork server, including the path of the test modules."""
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
    # imported modules live until the end: each full collection by DeepSpeed would take half a second for them
    gc.freeze()
    # the fork does not have the server's threads
    torch.set_num_threads(1)
    # start method of child processes, as under a launcher
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
    # plots and probes take half of a short run's time and have separate tests
    session.draw_curves = lambda records, path: None
    session.probe_recurrence = lambda model, evaluator: {}
    if first:
        first()
    with open(stdin) as sys.stdin:
        runpy.run_path(argv[0], run_name="__main__")
