"""Functions in several processes of one process group."""

import os
import traceback

import torch.distributed as dist

from forked import SERVER, start


def run_in_processes(function, n_processes, folder):
    """Return `function(rank)` of each rank, which must be picklable; ranks meet in a file of the folder."""
    results = SERVER.Queue()
    workers = [
        start(_work, function, rank, n_processes, f"file://{folder}/meeting", results) for rank in range(n_processes)
    ]
    found = dict(results.get(timeout=250) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    failures = [text for is_fine, text in found.values() if not is_fine]
    assert not failures, "\n".join(failures)
    return [found[rank][1] for rank in range(n_processes)]


def _work(function, rank, n_processes, place, results):
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=n_processes)
    try:
        results.put((rank, (True, function(rank))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)
