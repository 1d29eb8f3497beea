"""Start of the trackers (metrics.jsonl, TensorBoard, wandb) that a run's flags request."""

import functools
import socket
import sys
from collections.abc import Mapping
from typing import Any

from recurrent_bart.distributed import from_first, is_first, rank
from recurrent_bart.monitoring.progress import say
from recurrent_bart.monitoring.rank_metrics import RankTopology
from recurrent_bart.monitoring.tensorboard_tracker import TensorBoardTracker
from recurrent_bart.monitoring.tracker import Guarded, MetricsFile, Tracker, Trackers
from recurrent_bart.monitoring.wandb_tracker import WandbRun, WandbTracker, run_id, start_wandb
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.environment import (
    Environment,
    has_wandb_key,
    set_wandb_environment,
    wandb_mode,
    wandb_settings,
)
from recurrent_bart.training.tracking_arguments import TrackingArguments, split_tags

# default wandb project
PROJECT = "recurrent-bart"


def start_trackers(
    arguments: TrackingArguments, environment: Environment, folder: RunFolder, topology: RankTopology
) -> Trackers:
    """Start metrics.jsonl and TensorBoard on rank 0, and wandb on the first rank of each host.

    All ranks must call this function. Records that a resumed run logs again must be deleted from the folder first.
    """
    trackers: list[Tracker] = []
    if is_first():
        trackers.append(Guarded("metrics.jsonl", lambda: MetricsFile(folder), warn, gives_up=False))
    if is_first() and arguments.tensorboard:
        directory = folder.path / "tensorboard"
        trackers.append(Guarded("TensorBoard", lambda: TensorBoardTracker(directory, folder.read_metrics()), warn))
    given = wandb_settings()
    mode = wandb_mode(arguments.wandb_mode, given)
    # rank 0 sends the id in every mode: hosts may have different modes, and would wait forever without it
    first = from_first(_first_id(folder, given.get("run_id")) if is_first() and mode != "disabled" else None)
    if first is not None and mode != "disabled" and environment.local_rank == 0:
        identity, problem = first
        start = functools.partial(_start_wandb, identity, problem, mode, arguments, given, folder, topology)
        trackers.append(Guarded("wandb", start, warn))
    return Trackers(trackers)


def warn(text: str) -> None:
    """Print a warning. All ranks except 0 add their host name and rank."""
    if is_first():
        say(f"warning: {text}")
    else:
        print(f"warning: {text} ({socket.gethostname()}, rank {rank()})", file=sys.stderr, flush=True)


def _first_id(folder: RunFolder, requested_id: str | None) -> tuple[str, str]:
    """Return the wandb id and an error text. No error is raised, because all other ranks wait for the id."""
    try:
        identity = run_id(folder.path / "wandb", requested_id)
    # a crash of the host may have left a damaged file
    except (OSError, ValueError, KeyError, TypeError) as error:
        return "", str(error)
    if requested_id not in (None, identity):
        warn(f"WANDB_RUN_ID {requested_id} is not used: the id of this run in wandb is {identity}")
    return identity, ""


def _start_wandb(
    identity: str,
    problem: str,
    mode: str,
    arguments: TrackingArguments,
    given: Mapping[str, str],
    folder: RunFolder,
    topology: RankTopology,
) -> WandbTracker:
    if problem:
        raise OSError(problem)
    is_online = mode == "online"
    if is_online and not has_wandb_key(given):
        warn("wandb: no API key is set (WANDB_API_KEY, or wandb login); wandb continues offline")
        is_online = False
    set_wandb_environment(folder.path, given, is_online)
    run = WandbRun(
        id=identity,
        folder=(folder.path / "wandb").absolute(),
        is_online=is_online,
        node=topology.node,
        n_nodes=topology.n_nodes,
        host=topology.hosts[rank()],
        config=folder.read_config(),
        given=frozenset(given),
        **_wandb_names(arguments, given, folder.path.name),
    )
    return start_wandb(run, folder.read_metrics(), warn)


def _wandb_names(arguments: TrackingArguments, given: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the run's names in wandb: from flags, else from the user's wandb settings, else from the run folder."""
    return {
        "name": given.get("name", name),
        "group": arguments.wandb_group or given.get("run_group", name),
        "entity": arguments.wandb_entity or given.get("entity"),
        "project": arguments.wandb_project or given.get("project", PROJECT),
        "job_type": given.get("job_type", WandbRun.job_type),
        "tags": arguments.tags() or split_tags(given.get("tags", "")),
        "notes": given.get("notes"),
    }
