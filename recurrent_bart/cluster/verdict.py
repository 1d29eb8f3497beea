"""Which nodes are not fit for a long run, and why, from what their processes found."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_bart.cluster.node_checks import GIB, Report

# a node that is slower than this share of the others' is not as they are
SHARE_OF_OTHERS = 0.5


@dataclass(frozen=True)
class Expectations:
    """What a node must have at least.

    Attributes:
        memory_gib: Free memory.
        disk_gib: Free space in the folder that all share.
        within: GB/s of an all-reduce on it.
        between: GB/s of an all-reduce with a neighbour.
        clock_seconds: What its clock may be off.
    """

    memory_gib: float
    disk_gib: float
    within: float
    between: float
    clock_seconds: float


@dataclass
class Node:
    """One node, all its processes together.

    Attributes:
        name: Of the host.
        reports: Of its processes; None for those that said nothing.
    """

    name: str
    reports: list[Report | None]

    @property
    def found(self) -> list[Report]:
        """What there is of reports."""
        return [report for report in self.reports if report]

    @property
    def within(self) -> float | None:
        """GB/s on the node."""
        rates = [report.within for report in self.found if report.within]
        return min(rates) / 1e9 if rates else None

    @property
    def between(self) -> float | None:
        """GB/s with the neighbour that it reaches best: a bad neighbour is not its fault."""
        neighbours = {name for report in self.found for name in report.between}
        rates = [min(r.between[name] for r in self.found if name in r.between) for name in neighbours]
        return max(rates) / 1e9 if rates else None

    def line(self) -> str:
        """Its figures in a line."""
        if not self.found:
            return self.name
        first = self.found[0]
        figures = [f"{first.n_gpus} GPUs", f"{first.memory_bytes / GIB:.0f} GiB of memory free"]
        figures += [f"{first.disk_bytes / GIB:.0f} GiB of disk free, written at {first.disk_rate / 1e6:.0f} MB/s"]
        figures += [f"all-reduce {self.within:.1f} GB/s on it"] if self.within else []
        figures += [f"all-reduce {self.between:.1f} GB/s with the next"] if self.between else []
        return f"{self.name}: {', '.join(figures)}"


def by_node(reports: Sequence[Report | None], n_per_node: int, hosts: Sequence[str]) -> list[Node]:
    """Group what processes found, which are counted node by node.

    Args:
        hosts: Names of the nodes, for such as say nothing; may be empty.
    """
    nodes = []
    for first in range(0, len(reports), n_per_node):
        own = list(reports[first : first + n_per_node])
        said = [report.host for report in own if report]
        number = first // n_per_node
        nodes.append(Node(said[0] if said else hosts[number] if hosts else f"node number {number}", own))
    return nodes


def judge(nodes: Sequence[Node], expected: Expectations) -> dict[str, list[str]]:
    """What is wrong with each node; those with which nothing is are left out."""
    clocks = [report.clock for node in nodes for report in node.found if report.clock]
    typical = {name: _median([getattr(node, name) for node in nodes]) for name in ("within", "between")}
    wrong = {}
    for node in nodes:
        problems = [problem for report in node.found for problem in report.problems]
        n_silent = node.reports.count(None)
        problems += [f"{n_silent} of {len(node.reports)} processes say nothing"] if n_silent else []
        problems += _too_little(node, expected)
        for name, place in (("within", "on it"), ("between", "with the next")):
            rate = getattr(node, name)
            least = max(getattr(expected, name), SHARE_OF_OTHERS * typical[name])
            if rate is not None and rate < least:
                problems.append(f"all-reduce {place} at {rate:.2g} GB/s, expected {least:.2g}")
        off = max((abs(r.clock - statistics.median(clocks)) for r in node.found if r.clock), default=0.0)
        problems += [f"its clock is off by {off:.1f} s"] if off > expected.clock_seconds else []
        if problems:
            wrong[node.name] = list(dict.fromkeys(problems))
    return wrong


def _too_little(node: Node, expected: Expectations) -> list[str]:
    problems = []
    memory = min((report.memory_bytes / GIB for report in node.found), default=expected.memory_gib)
    # where nothing can be written, that is told already
    disk = min((report.disk_bytes / GIB for report in node.found if report.disk_rate), default=expected.disk_gib)
    if memory < expected.memory_gib:
        problems.append(f"{memory:.1f} GiB of memory free, expected {expected.memory_gib:g}")
    if disk < expected.disk_gib:
        problems.append(f"{disk:.1f} GiB of disk free, expected {expected.disk_gib:g}")
    return problems


def _median(rates: Sequence[float | None]) -> float:
    return statistics.median([rate for rate in rates if rate] or [0.0])
