"""Metrics of each rank since the last log line, and their reduction to one log line."""

import math
import resource
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from recurrent_bart.distributed import gather_objects, gather_rows, rank


@dataclass(frozen=True)
class RankTopology:
    """Host name, node index and device's peak FLOP/s for each rank. Rank numbers ascend node by node."""

    hosts: list[str]
    nodes: list[int]
    peaks: list[float]

    @classmethod
    def gather(cls, local_rank: int, peak: float) -> "RankTopology":
        """Gather the topology of all ranks. All ranks must call this function together."""
        found = gather_objects((socket.gethostname(), local_rank, peak))
        # Local rank 0 begins a new node.
        nodes = [sum(local == 0 for _, local, _ in found[: place + 1]) - 1 for place in range(len(found))]
        return cls([host for host, _, _ in found], nodes, [peak for _, _, peak in found])

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(set(self.nodes))

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return self.nodes[rank()]


@dataclass
class RankMetrics:
    """Metrics of one rank, summed over some steps.

    `backward_seconds` includes the wait for other ranks' gradients. On CPU, `allocated_bytes` is the peak memory of the
    process and `reserved_bytes` is 0. `n_retries` counts allocator retries after a failed allocation. Each rank holds a
    part of the last step's gradient. `backbone_square` is the squared norm of that part for BART's own parameters,
    `recurrence_square` for the recurrence's parameters.
    """

    loss: float = 0.0
    n_targets: float = 0.0
    n_tokens: float = 0.0
    n_documents: float = 0.0
    n_segments: float = 0.0
    n_flops: float = 0.0
    data_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    seconds: float = 0.0
    allocated_bytes: float = 0.0
    reserved_bytes: float = 0.0
    n_retries: float = 0.0
    backbone_square: float = math.nan
    recurrence_square: float = math.nan

    def own_seconds(self) -> float:
        """Return the seconds of data loading and forward passes, which include no waiting for other ranks."""
        return self.data_seconds + self.forward_seconds

    def read_memory(self, device: torch.device) -> None:
        """Set the memory fields to the peaks since the last call. Reset the peak counters of a GPU."""
        if device.type != "cuda":
            self.allocated_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
            return
        self.allocated_bytes = torch.cuda.max_memory_allocated(device)
        self.reserved_bytes = torch.cuda.max_memory_reserved(device)
        self.n_retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        torch.cuda.reset_peak_memory_stats(device)

    def of_all_ranks(self, device: torch.device) -> list["RankMetrics"]:
        """Return the metrics of all ranks, gathered in one collective call."""
        own = [float(getattr(self, item.name)) for item in fields(RankMetrics)]
        return [RankMetrics(*row) for row in gather_rows(own, device=device)]


def summarise(ranks: Sequence[RankMetrics], topology: RankTopology, n_steps: int) -> dict[str, Any]:
    """Reduce the metrics of all ranks over `n_steps` optimizer steps to one log line (see `fields.py`)."""
    # Use rank 0's time on every rank, so that all ranks compute the same log line.
    seconds = ranks[0].seconds
    n_tokens = _sum(ranks, "n_tokens")
    losses = [metrics.loss / metrics.n_targets for metrics in ranks if metrics.n_targets]
    rank_seconds = [metrics.own_seconds() / n_steps for metrics in ranks]
    slowest, fastest = (pick(range(len(ranks)), key=rank_seconds.__getitem__) for pick in (max, min))
    return {
        "loss": _share(_sum(ranks, "loss"), _sum(ranks, "n_targets")),
        "loss_max": max(losses, default=math.nan),
        "gradient_norm_backbone": math.sqrt(_sum(ranks, "backbone_square")),
        "gradient_norm_recurrence": math.sqrt(_sum(ranks, "recurrence_square")),
        "tokens_per_second": n_tokens / seconds,
        "tokens_per_second_per_device": n_tokens / seconds / len(ranks),
        "model_flops_share": _share_of_peak(_sum(ranks, "n_flops") / seconds, sum(topology.peaks)),
        "step_seconds": seconds / n_steps,
        **{name: _mean(ranks, name) / n_steps for name in ("data_seconds", "forward_seconds", "backward_seconds")},
        "optimizer_seconds": _mean(ranks, "optimizer_seconds") / n_steps,
        "slowest_rank": slowest,
        "slowest_host": topology.hosts[slowest],
        "slowest_seconds": rank_seconds[slowest],
        "fastest_rank": fastest,
        "fastest_host": topology.hosts[fastest],
        "fastest_seconds": rank_seconds[fastest],
        "rank_seconds": rank_seconds,
        "memory_allocated_bytes": int(max(metrics.allocated_bytes for metrics in ranks)),
        "memory_reserved_bytes": int(max(metrics.reserved_bytes for metrics in ranks)),
        "memory_retries": int(_sum(ranks, "n_retries")),
        "segments_per_document": _share(_sum(ranks, "n_segments"), _sum(ranks, "n_documents")),
    }


def _sum(ranks: Sequence[RankMetrics], name: str) -> float:
    return sum(getattr(metrics, name) for metrics in ranks)


def _mean(ranks: Sequence[RankMetrics], name: str) -> float:
    return _sum(ranks, name) / len(ranks)


def _share_of_peak(flops_per_second: float, peak: float) -> float:
    """Return the share of the peak. Above 1, return NaN: other processes slowed the measurement of the peak."""
    share = flops_per_second / peak
    return share if share <= 1 else math.nan


def _share(part: float, whole: float) -> float:
    """Return `part / whole`, or NaN if `whole` is 0, for example if all steps were skipped."""
    return part / whole if whole else math.nan
