"""Runs a function in several processes of one group."""

import multiprocessing
import os
import traceback

import torch
import torch.distributed as dist


def run_in_processes(function, n_processes, folder):
    """What `function(rank)` returned on each of them, which must be picklable; they meet in a file of the folder."""
    # forked, they need not import everything again
    context = multiprocessing.get_context("fork")
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
