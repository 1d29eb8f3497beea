"""Test every node before a long run, and print the names of bad nodes: `sbatch slurm/preflight.sh`."""

import argparse
import os
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from recurrent_bart.cluster.node_checks import Report, check_node, collect, leave, measure_network, meet
from recurrent_bart.cluster.verdict import Expectations, Node, by_node, judge
from recurrent_bart.training.environment import Rendezvous, launched_rendezvous
from recurrent_bart.training.flags import FlagParser

# Minimum all-reduce bandwidth in GB/s, within a node (NVLink) and between nodes (training network); 0 without GPUs.
RATES = {True: (50.0, 5.0), False: (0.0, 0.0)}


def build_parser() -> FlagParser:
    """Build the parser of all flags."""
    within, between = RATES[torch.cuda.is_available()]
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--gpus", type=int, default=torch.cuda.device_count(), help="required GPUs per node; default: GPUs of this node"
    )
    parser.add_argument("--per_node", type=int, default=1, help="processes per node; default: %(default)s")
    parser.add_argument(
        "--hosts", nargs="*", default=[], help="names of all nodes, to report nodes that do not answer; default: none"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="folder shared by all nodes; default: current folder"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="local folder of each node; default: %(default)s",
    )
    parser.add_argument(
        "--min_memory", type=float, default=8.0, help="required free CPU memory per node, in GiB; default: %(default)s"
    )
    parser.add_argument(
        "--min_disk",
        type=float,
        default=10.0,
        help="required free disk space in --folder, in GiB; default: %(default)s",
    )
    parser.add_argument(
        "--min_within",
        type=float,
        default=within,
        help="required all-reduce bandwidth within a node, in GB/s; default: 50, or 0 without GPUs",
    )
    parser.add_argument(
        "--min_between",
        type=float,
        default=between,
        help="required all-reduce bandwidth with the next node, in GB/s; default: 5, or 0 without GPUs",
    )
    parser.add_argument(
        "--max_clock",
        type=float,
        default=2.0,
        help="largest clock difference of a node, in seconds; default: %(default)s",
    )
    parser.add_argument(
        "--wait", type=float, default=40.0, help="time limit of each part of the test, in seconds; default: %(default)s"
    )
    return parser


def main(argv: list[str]) -> int:
    """Test this node and send a report to rank 0, which judges all nodes. Return the exit code."""
    arguments = build_parser().parse_flags(argv)
    meeting = launched_rendezvous()
    try:
        store = meet(meeting, arguments.wait)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"{socket.gethostname()}: cannot reach {meeting.address}:{meeting.port} ({reason})", file=sys.stderr)
        return 1
    report = check_node(meeting.local_rank, arguments.gpus, arguments.folder, arguments.scratch)
    leave(store, "alone", meeting.rank, report)
    if meeting.rank == 0:
        return lead(arguments, meeting, store, report)
    if decision(store, arguments.wait):
        try_network(arguments, meeting, store, report)
        leave(store, "together", meeting.rank, report)
    return 0


def lead(arguments: argparse.Namespace, meeting: Rendezvous, store: dist.Store, report: Report) -> int:
    """Collect the reports of all ranks on rank 0. Judge the nodes, print the result, and return the exit code."""
    reports = collect(store, "alone", meeting.world_size, arguments.wait)
    # A missing GPU or process would block all ranks in the network test.
    can_meet = all(other and other.n_gpus >= arguments.gpus for other in reports)
    store.set("decision", "network" if can_meet else "over")
    if can_meet:
        try_network(arguments, meeting, store, report)
        leave(store, "together", meeting.rank, report)
        reports = collect(store, "together", meeting.world_size, arguments.wait)
    nodes = by_node(reports, arguments.per_node, arguments.hosts)
    expected = Expectations(
        arguments.min_memory, arguments.min_disk, arguments.min_within, arguments.min_between, arguments.max_clock
    )
    return tell(nodes, judge(nodes, expected))


def decision(store: dist.Store, seconds: float) -> bool:
    """Wait for the decision of rank 0. Return True if rank 0 decides to test the network."""
    try:
        # Wait for twice the time, because rank 0 waits for other ranks before it decides.
        store.wait(["decision"], timedelta(seconds=2 * seconds))
    except RuntimeError:
        return False
    return store.get("decision") == b"network"


def try_network(arguments: argparse.Namespace, meeting: Rendezvous, store: dist.Store, report: Report) -> None:
    """Measure the network. Add a failure to this rank's report."""
    try:
        measure_network(report, meeting, store, arguments.per_node, arguments.wait)
    except RuntimeError as error:
        report.problems.append(f"all-reduce failed ({str(error).splitlines()[0]})")


def tell(nodes: list[Node], wrong: dict[str, list[str]]) -> int:
    """Print one line per node and the problems of bad nodes. Return the exit code."""
    for node in nodes:
        print(node.line())
    for name, problems in wrong.items():
        print(f"bad node {name}: {'; '.join(problems)}")
    if wrong:
        print(f"to leave out the bad nodes: --exclude={','.join(wrong)}", flush=True)
    else:
        print(f"all {len(nodes)} nodes passed", flush=True)
    return 1 if wrong else 0


def run(argv: list[str]) -> NoReturn:
    """Run the command as a process, which exits at once.

    Other ranks may never answer, and threads of the process group would wait for these ranks.
    """
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)
