"""Runs a function in several processes of one group."""

import os
import sys
import traceback
from pathlib import Path

# as multiprocessing, but functions within functions can be sent too
import multiprocess
import torch
import torch.distributed as dist


def run_in_processes(function, n_processes, folder):
    """What `function(rank)` returned on each of them, which must be picklable; they meet in a file of the folder."""
    # forked from a server that has imported what takes long, and has no threads: forked from this process, which may
    # have some, they could wait for ever for a lock that one of them held
    context = multiprocess.get_context("forkserver")
    # the modules of tests are found from here, in those processes too
    sys.path.append(str(Path(__file__).parents[1]))
    context.set_forkserver_preload(["torch", "transformers.models.bart.modeling_bart", "datasets"])
    results = context.Queue()
    workers = [
        context.Process(target=_work, args=(function, rank, n_processes, f"file://{folder}/meeting", results))
        for rank in range(n_processes)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=100) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    failures = [text for is_fine, text in found.values() if not is_fine]
    assert not failures, "\n".join(failures)
    return [found[rank][1] for rank in range(n_processes)]


def _work(function, rank, n_processes, place, results):
    # the threads of the process that was forked are not here
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=n_processes)
    try:
        results.put((rank, (True, function(rank))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)
