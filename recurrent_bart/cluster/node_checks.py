"""What each process finds out about its node before a long run, and how fast it reaches the others."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from recurrent_bart.training.environment import Rendezvous

GIB = 2**30
DISK_TEST_BYTES = 32 * 2**20
# of a GPU that nobody else uses
FREE_SHARE = 0.9
# as many as fill the network; a processor would take seconds for those of a GPU
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
N_REDUCTIONS = 5


@dataclass
class Report:
    """What one process found.

    Attributes:
        host: Name of its node.
        problems: What is wrong there, in words.
        n_gpus: GPUs it sees.
        memory_bytes: Memory of the node that is free.
        disk_bytes: Free space of the folder that all share.
        disk_rate: Bytes a second that it wrote there.
        clock: Seconds since 1970, at a moment that is the same for all.
        within: Bytes a second of an all-reduce on the node; None where it has one process.
        between: Likewise with each neighbouring node, by its number.
    """

    host: str
    problems: list[str] = field(default_factory=list)
    n_gpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    disk_rate: float = 0.0
    clock: float = 0.0
    within: float | None = None
    between: dict[str, float] = field(default_factory=dict)


def check_node(local_rank: int, n_gpus: int, shared: Path, scratch: Path) -> Report:
    """Everything that needs no other process."""
    report = Report(socket.gethostname(), n_gpus=torch.cuda.device_count())
    report.memory_bytes = psutil.virtual_memory().available
    report.problems += _gpu_problems(local_rank, report.n_gpus, n_gpus)
    for folder in (scratch, shared):
        try:
            report.disk_rate = write_rate(folder)
            report.disk_bytes = psutil.disk_usage(str(folder)).free
        except OSError as error:
            report.problems.append(f"{folder} cannot be written ({error.strerror})")
    return report


def _gpu_problems(local_rank: int, n_seen: int, n_expected: int) -> Iterator[str]:
    if n_seen < n_expected:
        yield f"{n_seen} GPUs, not {n_expected}"
    elif n_expected:
        try:
            free, total = torch.cuda.mem_get_info(local_rank)
        except RuntimeError as error:
            yield f"GPU {local_rank} does not work ({str(error).splitlines()[0]})"
        else:
            if free < FREE_SHARE * total:
                yield f"GPU {local_rank}: {(total - free) / GIB:.0f} of {total / GIB:.0f} GiB are taken"


def write_rate(folder: Path) -> float:
    """Bytes a second that reach the disk.

    Raises:
        OSError: They do not.
    """
    place = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    megabyte = os.urandom(2**20)
    started = time.perf_counter()
    try:
        with place.open("wb") as file:
            for _ in range(DISK_TEST_BYTES // len(megabyte)):
                file.write(megabyte)
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
    return DISK_TEST_BYTES / (time.perf_counter() - started)


def meet(meeting: Rendezvous, seconds: float) -> dist.TCPStore:
    """Where processes leave what they found, even such as cannot take part in a collective.

    Raises:
        RuntimeError: The first process does not answer.
    """
    timeout = timedelta(seconds=seconds)
    is_first = meeting.rank == 0
    # the first one does not wait: it is to say who is missing
    return dist.TCPStore(
        meeting.address, meeting.port, meeting.world_size, is_first, timeout=timeout, wait_for_workers=False
    )


def leave(store: dist.Store, stage: str, rank: int, report: Report) -> None:
    """Let the first process read it."""
    store.set(f"{stage}-{rank}", json.dumps(asdict(report)))


def collect(store: dist.Store, stage: str, world_size: int, seconds: float) -> list[Report | None]:
    """What every process has left, in order of rank; None for those that leave nothing in time."""
    end = time.monotonic() + seconds
    found: list[Report | None] = []
    for rank in range(world_size):
        try:
            store.wait([f"{stage}-{rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
            found.append(Report(**json.loads(store.get(f"{stage}-{rank}"))))
        except RuntimeError:
            found.append(None)
    return found


def neighbours(n_nodes: int) -> list[tuple[int, int]]:
    """Pairs of nodes whose network is measured, each node in two: a slow one is slow in both.

    Pairs that share no node come one after the other, so that they are measured at the same time.
    """
    ring = [(node, (node + 1) % n_nodes) for node in range(n_nodes)] if n_nodes > 2 else [(0, 1)][: n_nodes - 1]
    return ring[::2] + ring[1::2]


def measure_network(report: Report, meeting: Rendezvous, store: dist.Store, n_per_node: int, seconds: float) -> None:
    """All-reduce on the node and with its neighbours; all processes call it, and have the same clock at its end."""
    device = torch.device("cuda", meeting.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=seconds),
    )
    node = meeting.rank // n_per_node
    for first in range(0, meeting.world_size, n_per_node):
        group = dist.new_group(list(range(first, first + n_per_node)))
        if first == node * n_per_node and n_per_node > 1:
            report.within = reduction_rate(group, device)
    for pair in neighbours(meeting.world_size // n_per_node):
        ranks = [place * n_per_node + local for place in sorted(pair) for local in range(n_per_node)]
        group = dist.new_group(ranks)
        if node in pair:
            other = pair[0] if node == pair[1] else pair[1]
            try:
                report.between[str(other)] = reduction_rate(group, device)
            except RuntimeError as error:
                report.problems.append(f"no all-reduce with node number {other} ({str(error).splitlines()[0]})")
    dist.barrier()
    report.clock = time.time()


def reduction_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes a second that each process sends in an all-reduce, the fastest of some."""
    values = torch.ones(REDUCED_BYTES[device.type] // 4, device=device)
    size, best = dist.get_world_size(group), float("inf")
    # the first one connects
    for _ in range(N_REDUCTIONS + 1):
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        # what was summed is there
        values[0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * (size - 1) / size * values.nbytes / best
