"""Starts launch/train.py in processes that nobody watches over, with something that goes wrong in some of them.

A launcher ends all processes when one has ended; here each must see for itself. They are forked from one that has
imported everything, so a run takes a second or two.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, half of the time that an engine takes to be built
import torch

import launching
from faults import injected
from recurrent_bart.training import experiment

TRAIN = launching.TESTS.parent / "launch" / "train.py"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


@dataclass
class Ended:
    """What the processes of a run have left: exit codes by rank (-9: killed), and what they printed."""

    codes: list[int]
    printed: list[str]
    seconds: float

    def text(self):
        return "\n".join(self.printed)


def train(flags, folder, n_processes=2, fault=None, ranks=(1,), timeout=100, ends_when=None, **settings):
    """Run until all processes have ended.

    Args:
        flags: Command line.
        folder: Where the processes meet and print.
        n_processes: How many.
        fault: Name of a function of `injected`, called in the processes `ranks` before they begin.
        ranks: Where it goes wrong.
        timeout: Seconds after which those left are killed, and the test fails.
        ends_when: Once these ranks have ended, the others are killed: they hang on purpose.
        settings: Of the fault.
    """
    port, started = launching.free_port(), time.perf_counter()
    logs = [folder / f"printed-{rank}.txt" for rank in range(n_processes)]
    faults = [(fault, settings) if fault and rank in ranks else None for rank in range(n_processes)]
    with _environment():
        processes = [
            SERVER.Process(target=_run_rank, args=(rank, n_processes, port, list(flags), logs[rank], faults[rank]))
            for rank in range(n_processes)
        ]
        for process in processes:
            process.start()
    waited_for = [processes[rank] for rank in ends_when] if ends_when else processes
    for process in waited_for:
        process.join(max(0.1, started + timeout - time.perf_counter()))
    seconds = time.perf_counter() - started
    hanging = [rank for rank, process in enumerate(processes) if process in waited_for and process.is_alive()]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    ended = Ended([process.exitcode for process in processes], [log.read_text() for log in logs], seconds)
    assert not hanging, f"rank {hanging} had not ended after {timeout} s\n{ended.text()}"
    return ended


@contextlib.contextmanager
def _environment():
    """What the fork server is started with, and hands on."""
    before = dict(os.environ)
    os.environ.update(launching.environment())
    for name in launching.LAUNCHED:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_rank(rank, n_processes, port, flags, log: Path, fault):
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    torch.set_num_threads(1)
    # of the processes that it starts in turn, as where it is started by a launcher
    multiprocessing.set_start_method("fork", force=True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
    # half of the time of a short run, and tested elsewhere
    experiment.draw_curves = lambda records, path: None
    os.chdir(TRAIN.parents[1])
    sys.argv = [str(TRAIN), *map(str, flags)]
    if fault:
        name, settings = fault
        getattr(injected, name)(**settings)
    runpy.run_path(str(TRAIN), run_name="__main__")
