"""Starts the trackers that a run's arguments ask for."""

import socket
import sys

from recurrent_bart.distributed import from_first, is_first, rank
from recurrent_bart.monitoring.progress import say
from recurrent_bart.monitoring.rank_figures import Places
from recurrent_bart.monitoring.run_folder import RunFolder
from recurrent_bart.monitoring.tensorboard_tracker import TensorBoardTracker
from recurrent_bart.monitoring.tracker import Guarded, MetricsFile, Tracker, Trackers
from recurrent_bart.monitoring.wandb_tracker import WandbRun, WandbTracker, run_id, start_wandb
from recurrent_bart.training.arguments import TrackingArguments
from recurrent_bart.training.environment import Environment, has_wandb_key, place_wandb, wandb_mode


def start_trackers(
    arguments: TrackingArguments, environment: Environment, folder: RunFolder, places: Places
) -> Trackers:
    """The run's file and TensorBoard for the first process, wandb for the first one of each machine.

    All processes call it together, once the folder holds what is logged of the run so far.
    """
    trackers: list[Tracker] = []
    if is_first():
        trackers.append(Guarded("metrics.jsonl", lambda: MetricsFile(folder), warn, gives_up=False))
    if is_first() and arguments.tensorboard:
        place = folder.path / "tensorboard"
        trackers.append(Guarded("TensorBoard", lambda: TensorBoardTracker(place, folder.read_metrics()), warn))
    if wandb_mode(arguments.wandb_mode) != "disabled":
        identity, problem = from_first(_first_id(folder) if is_first() else None)
        if environment.local_rank == 0:
            trackers.append(Guarded("wandb", lambda: _start_wandb(identity, problem, arguments, folder, places), warn))
    return Trackers(trackers)


def warn(text: str) -> None:
    """Say a warning, on other machines with their name."""
    if is_first():
        say(f"warning: {text}")
    else:
        print(f"warning: {text} ({socket.gethostname()}, rank {rank()})", file=sys.stderr, flush=True)


def _first_id(folder: RunFolder) -> tuple[str, str]:
    """The run's id, and why there is none: no process may be left waiting for it."""
    try:
        return run_id(folder.path / "wandb"), ""
    except OSError as error:
        return "", str(error)


def _start_wandb(
    identity: str, problem: str, arguments: TrackingArguments, folder: RunFolder, places: Places
) -> WandbTracker:
    if problem:
        raise OSError(problem)
    place_wandb(folder.path)
    is_online = wandb_mode(arguments.wandb_mode) == "online"
    if is_online and not has_wandb_key():
        warn("wandb: no API key is set (WANDB_API_KEY, or wandb login); it goes on offline")
        is_online = False
    name = folder.path.name
    run = WandbRun(
        id=identity,
        folder=(folder.path / "wandb").absolute(),
        is_online=is_online,
        node=places.node,
        n_nodes=places.n_nodes,
        host=places.hosts[rank()],
        name=name,
        group=arguments.wandb_group or name,
        entity=arguments.wandb_entity,
        project=arguments.wandb_project,
        tags=arguments.tags(),
        config=folder.read_config(),
    )
    return start_wandb(run, folder.read_metrics(), warn)
