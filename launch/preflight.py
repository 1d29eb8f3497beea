"""Look at every node before a long run, and name the bad ones: `sbatch slurm/preflight.sh`."""

import argparse
import os
import socket
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recurrent_bart.cluster.node_checks import Report, check_node, collect, leave, measure_network, meet
from recurrent_bart.cluster.verdict import Expectations, Node, by_node, judge
from recurrent_bart.training.environment import Rendezvous, launched_rendezvous
from recurrent_bart.training.flags import FlagParser

# of all-reduces, in GB/s: NVLink within a node, a network made for training between nodes; a processor has neither
RATES = {True: (50.0, 5.0), False: (0.0, 0.0)}


def build_parser() -> FlagParser:
    """Parser of all flags."""
    within, between = RATES[torch.cuda.is_available()]
    parser = FlagParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="GPUs that each node must have")
    parser.add_argument("--per_node", type=int, default=1, help="processes of each node")
    parser.add_argument("--hosts", nargs="*", default=[], help="names of the nodes, for those that say nothing")
    parser.add_argument("--folder", type=Path, default=Path("."), help="folder that all nodes share")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder of each node's own")
    parser.add_argument("--min_memory", type=float, default=8.0, help="GiB of memory free on each node")
    parser.add_argument("--min_disk", type=float, default=10.0, help="GiB free in the folder")
    parser.add_argument("--min_within", type=float, default=within, help="GB/s of an all-reduce on a node")
    parser.add_argument("--min_between", type=float, default=between, help="GB/s of one with the next node")
    parser.add_argument("--max_clock", type=float, default=2.0, help="seconds that a clock may be off")
    parser.add_argument("--wait", type=float, default=40.0, help="seconds that nodes have for each part of it")
    return parser


def main(argv: list[str]) -> int:
    """Look, tell the first process, let it judge."""
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
    """As the first process, ask for what the others found, and say which nodes are bad."""
    reports = collect(store, "alone", meeting.world_size, arguments.wait)
    # a GPU that is not there, or a process, would keep all the others waiting
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
    """Whether the network is measured, as the first process says."""
    try:
        # it waits for others itself before
        store.wait(["decision"], timedelta(seconds=2 * seconds))
    except RuntimeError:
        return False
    return store.get("decision") == b"network"


def try_network(arguments: argparse.Namespace, meeting: Rendezvous, store: dist.Store, report: Report) -> None:
    """Measure it; what fails is part of the report."""
    try:
        measure_network(report, meeting, store, arguments.per_node, arguments.wait)
    except RuntimeError as error:
        report.problems.append(f"no all-reduce ({str(error).splitlines()[0]})")


def tell(nodes: list[Node], wrong: dict[str, list[str]]) -> int:
    """Print what was found; the return code."""
    for node in nodes:
        print(node.line())
    for name, problems in wrong.items():
        print(f"bad node {name}: {'; '.join(problems)}")
    if wrong:
        print(f"leave them out: --exclude={','.join(wrong)}", flush=True)
    else:
        print(f"all {len(nodes)} nodes are fit", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # the others may never answer, and what is left of a group would wait for them
    os._exit(code)
