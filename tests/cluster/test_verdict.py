"""Verdict on nodes: a bad node is reported with its problem, a good node is not."""

import dataclasses

import pytest

from recurrent_bart.cluster.node_checks import GIB, Report, neighbours
from recurrent_bart.cluster.verdict import Expectations, by_node, judge

EXPECTED = Expectations(memory_gib=8, disk_gib=10, within=50, between=5, clock_seconds=2)
NAMES = ["ada", "bob", "cyd"]


def report(host, rates=(20e9, 20e9), **changes):
    """Build a report without problems from one of two ranks of a node in a ring of three nodes."""
    number = NAMES.index(host)
    others = {str((number + 1) % 3): rates[0], str((number + 2) % 3): rates[1]}
    values = {"n_gpus": 2, "memory_bytes": 64 * GIB, "disk_bytes": 100 * GIB, "disk_rate": 1e9, "clock": 1e9}
    return Report(host, **{**values, "within": 200e9, "between": others, **changes})


def verdict(changed, **changes):
    """Return the verdict on three nodes, of which one is changed."""
    reports = [report(name, **(changes if name == changed else {})) for name in NAMES for _ in range(2)]
    return judge(by_node(reports, 2, NAMES), EXPECTED)


def test_good_nodes_are_not_reported():
    assert verdict(None) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"problems": ["1 GPUs found, 2 required"]}, "1 GPUs found, 2 required"),
        ({"memory_bytes": 4 * GIB}, "4.0 GiB of memory free, at least 8 required"),
        ({"disk_bytes": 3 * GIB}, "3.0 GiB of disk free, at least 10 required"),
        ({"within": 60e9}, "all-reduce within the node at 60 GB/s, at least 1e+02 required"),
        ({"within": 20e9}, "all-reduce within the node at 20 GB/s, at least 1e+02 required"),
        ({"clock": 1e9 + 3}, "clock differs by 3.0 s from the median of the nodes"),
    ],
)
def test_a_bad_node_is_reported_with_its_problem(changes, expected):
    # bob, the middle node; the problem of both ranks is reported once
    assert verdict("bob", **changes) == {"bob": [expected]}


def test_a_slow_neighbour_does_not_make_a_node_bad():
    slow, fast = 1e9, 20e9
    rates = {"ada": (slow, fast), "bob": (slow, slow), "cyd": (fast, slow)}
    reports = [report(name, rates[name]) for name in NAMES for _ in range(2)]
    assert judge(by_node(reports, 2, NAMES), EXPECTED) == {
        "bob": ["all-reduce with a neighbour node at 1 GB/s, at least 10 required"]
    }


def test_equally_slow_nodes_are_compared_with_the_required_rate():
    reports = [report(name, (1e9, 1e9)) for name in NAMES for _ in range(2)]
    assert list(judge(by_node(reports, 2, NAMES), EXPECTED)) == NAMES
    assert judge(by_node(reports, 2, NAMES), dataclasses.replace(EXPECTED, between=0.5)) == {}


def test_a_node_without_a_report_is_named_by_the_job():
    reports = [report("ada"), report("ada"), None, None, report("cyd"), None]
    expected = {"bob": ["2 of 2 processes did not report"], "cyd": ["1 of 2 processes did not report"]}
    assert judge(by_node(reports, 2, NAMES), EXPECTED) == expected
    assert "node number 1" in judge(by_node(reports, 2, []), EXPECTED)


@pytest.mark.parametrize(
    ("n_nodes", "pairs"),
    [(1, []), (2, [(0, 1)]), (3, [(0, 1), (2, 0), (1, 2)]), (4, [(0, 1), (2, 3), (1, 2), (3, 0)])],
)
def test_each_node_is_measured_with_both_of_its_neighbours(n_nodes, pairs):
    assert neighbours(n_nodes) == pairs
