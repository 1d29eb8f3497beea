"""Decision about the nodes that are unfit for a long run, based on the reports of their ranks."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_bart.cluster.node_checks import GIB, Report

# smallest accepted share of the median all-reduce rate of all nodes
LEAST_SHARE_OF_MEDIAN = 0.5


@dataclass(frozen=True)
class Expectations:
    """Minimum requirements of a node.

    Attributes:
        memory_gib: Free CPU memory in GiB.
        disk_gib: Free space in the shared folder in GiB.
        within: All-reduce rate on the node in GB/s.
        between: All-reduce rate with a neighbouring node in GB/s.
        clock_seconds: Largest accepted difference from the median clock in seconds.
    """

    memory_gib: float
    disk_gib: float
    within: float
    between: float
    clock_seconds: float


@dataclass
class Node:
    """Reports of the ranks on one node. The report of a rank that sent none is None."""

    name: str
    reports: list[Report | None]

    @property
    def found(self) -> list[Report]:
        """Reports that rank 0 received."""
        return [report for report in self.reports if report]

    @property
    def within(self) -> float | None:
        """All-reduce rate on the node in GB/s; None if it was not measured."""
        rates = [report.within for report in self.found if report.within]
        return min(rates) / 1e9 if rates else None

    @property
    def between(self) -> float | None:
        """All-reduce rate in GB/s with the neighbour that is reached fastest; a slow neighbour does not count."""
        neighbours = {name for report in self.found for name in report.between}
        rates = [min(r.between[name] for r in self.found if name in r.between) for name in neighbours]
        return max(rates) / 1e9 if rates else None

    def line(self) -> str:
        """Return a line of text with the measurements of the node."""
        if not self.found:
            return self.name
        first = self.found[0]
        parts = [f"{first.n_gpus} GPUs", f"{first.memory_bytes / GIB:.0f} GiB of memory free"]
        parts += [f"{first.disk_bytes / GIB:.0f} GiB of disk free, written at {first.disk_rate / 1e6:.0f} MB/s"]
        parts += [f"all-reduce {self.within:.1f} GB/s within the node"] if self.within else []
        parts += [f"all-reduce {self.between:.1f} GB/s with a neighbour node"] if self.between else []
        return f"{self.name}: {', '.join(parts)}"


def by_node(reports: Sequence[Report | None], n_per_node: int, hosts: Sequence[str]) -> list[Node]:
    """Group reports, given in order of rank, by node. `hosts` names nodes without reports. `hosts` may be empty."""
    nodes = []
    for first in range(0, len(reports), n_per_node):
        own = list(reports[first : first + n_per_node])
        said = [report.host for report in own if report]
        number = first // n_per_node
        nodes.append(Node(said[0] if said else hosts[number] if hosts else f"node number {number}", own))
    return nodes


def judge(nodes: Sequence[Node], expected: Expectations) -> dict[str, list[str]]:
    """Return the problems of each unfit node by host name. Nodes without a problem have no entry."""
    clocks = [report.clock for node in nodes for report in node.found if report.clock]
    typical = {name: _median([getattr(node, name) for node in nodes]) for name in ("within", "between")}
    wrong = {}
    for node in nodes:
        problems = [problem for report in node.found for problem in report.problems]
        n_silent = node.reports.count(None)
        problems += [f"{n_silent} of {len(node.reports)} processes did not report"] if n_silent else []
        problems += _too_little(node, expected)
        for name, place in (("within", "within the node"), ("between", "with a neighbour node")):
            rate = getattr(node, name)
            least = max(getattr(expected, name), LEAST_SHARE_OF_MEDIAN * typical[name])
            if rate is not None and rate < least:
                problems.append(f"all-reduce {place} at {rate:.2g} GB/s, at least {least:.2g} required")
        off = max((abs(r.clock - statistics.median(clocks)) for r in node.found if r.clock), default=0.0)
        problems += (
            [f"clock differs by {off:.1f} s from the median of the nodes"] if off > expected.clock_seconds else []
        )
        if problems:
            wrong[node.name] = list(dict.fromkeys(problems))
    return wrong


def _too_little(node: Node, expected: Expectations) -> list[str]:
    problems = []
    memory = min((report.memory_bytes / GIB for report in node.found), default=expected.memory_gib)
    # a folder that cannot be written is already among the problems
    disk = min((report.disk_bytes / GIB for report in node.found if report.disk_rate), default=expected.disk_gib)
    if memory < expected.memory_gib:
        problems.append(f"{memory:.1f} GiB of memory free, at least {expected.memory_gib:g} required")
    if disk < expected.disk_gib:
        problems.append(f"{disk:.1f} GiB of disk free, at least {expected.disk_gib:g} required")
    return problems


def _median(rates: Sequence[float | None]) -> float:
    return statistics.median([rate for rate in rates if rate] or [0.0])
