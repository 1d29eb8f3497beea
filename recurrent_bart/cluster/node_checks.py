"""Checks that each rank makes of its node before a long run: GPUs, memory, disk, network, clock."""

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
# smallest share of free memory on a GPU that no other process uses
LEAST_FREE_SHARE = 0.9
# number of bytes in one all-reduce: on GPUs, enough to saturate the network; on CPUs less, to save seconds
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
N_REDUCTIONS = 5


@dataclass
class Report:
    """Result of the checks of one rank.

    Attributes:
        host: Name of the node.
        problems: One message per problem.
        n_gpus: GPUs that the rank sees.
        memory_bytes: Free CPU memory of the node.
        disk_bytes: Free space in the shared folder.
        disk_rate: Write rate to the shared folder in bytes per second.
        clock: Time of the node in seconds since the epoch, taken right after a barrier of all ranks.
        within: All-reduce rate on the node in bytes per second; None for a node with one process.
        between: All-reduce rate with each neighbouring node in bytes per second; keys are node numbers.
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
    """Run the checks that need no other rank: GPUs, CPU memory and disk."""
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
        yield f"{n_seen} GPUs found, {n_expected} required"
    elif n_expected:
        try:
            free, total = torch.cuda.mem_get_info(local_rank)
        except RuntimeError as error:
            yield f"GPU {local_rank} does not work ({str(error).splitlines()[0]})"
        else:
            if free < LEAST_FREE_SHARE * total:
                yield f"GPU {local_rank}: {(total - free) / GIB:.0f} of {total / GIB:.0f} GiB are in use"


def write_rate(folder: Path) -> float:
    """Measure the bytes per second that reach the disk. Raise OSError if the folder cannot be written."""
    probe_file = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    megabyte = os.urandom(2**20)
    started = time.perf_counter()
    try:
        with probe_file.open("wb") as file:
            for _ in range(DISK_TEST_BYTES // len(megabyte)):
                file.write(megabyte)
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe_file.unlink(missing_ok=True)
    return DISK_TEST_BYTES / (time.perf_counter() - started)


def meet(meeting: Rendezvous, seconds: float) -> dist.TCPStore:
    """Connect to rank 0's key-value store for reports. Raise RuntimeError if rank 0 does not answer.

    A store also works for ranks that cannot take part in a collective.
    """
    timeout = timedelta(seconds=seconds)
    is_first = meeting.rank == 0
    # rank 0 does not wait for the workers, so that rank 0 can report which ranks are missing
    return dist.TCPStore(
        meeting.address, meeting.port, meeting.world_size, is_first, timeout=timeout, wait_for_workers=False
    )


def leave(store: dist.Store, stage: str, rank: int, report: Report) -> None:
    """Write this rank's report to the store, where rank 0 reads it."""
    store.set(f"{stage}-{rank}", json.dumps(asdict(report)))


def collect(store: dist.Store, stage: str, world_size: int, seconds: float) -> list[Report | None]:
    """Read the reports of all ranks, in order of rank. The entry of a rank that sends no report in time is None."""
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
    """Return the pairs of nodes between which the network is measured. A slow node is slow in each of its pairs.

    Pairs that share no node are adjacent in the list, so they are measured at the same time.
    """
    ring = [(node, (node + 1) % n_nodes) for node in range(n_nodes)] if n_nodes > 2 else [(0, 1)][: n_nodes - 1]
    return ring[::2] + ring[1::2]


def measure_network(report: Report, meeting: Rendezvous, store: dist.Store, n_per_node: int, seconds: float) -> None:
    """Measure all-reduce rates on the node and with neighbours, then read the clock.

    All ranks must call this function.
    """
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
        ranks = [number * n_per_node + local for number in sorted(pair) for local in range(n_per_node)]
        group = dist.new_group(ranks)
        if node in pair:
            other = pair[0] if node == pair[1] else pair[1]
            try:
                report.between[str(other)] = reduction_rate(group, device)
            except RuntimeError as error:
                report.problems.append(f"all-reduce with node number {other} failed ({str(error).splitlines()[0]})")
    dist.barrier()
    report.clock = time.time()


def reduction_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the send rate of a rank in an all-reduce in bytes per second: the highest of `N_REDUCTIONS` runs."""
    values = torch.ones(REDUCED_BYTES[device.type] // 4, device=device)
    size, best = dist.get_world_size(group), float("inf")
    # the first all-reduce also opens the connections
    for _ in range(N_REDUCTIONS + 1):
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        # reading an element waits for the result
        values[0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * (size - 1) / size * values.nbytes / best
