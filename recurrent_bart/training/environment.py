"""The process that we are in: its rank, its device, its process group. The one place that reads `os.environ`."""

import logging
import netrc
import os
import socket
import tempfile
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import deepspeed
import deepspeed.ops
import torch
import transformers

from recurrent_bart.monitoring.wandb_tracker import WANDB_MODES

# what a launcher tells each process
GIVEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# what wandb keeps beside its runs
WANDB_FOLDERS = ("CACHE", "CONFIG", "DATA")


@dataclass(frozen=True)
class Environment:
    """Where this process stands.

    Attributes:
        rank: Number of the process, over all machines.
        local_rank: Number on this machine, and of its device.
        world_size: Number of processes.
        device: Where it computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def launched_rank() -> int:
    """Rank that the launcher gave, before anything is started."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class Meeting:
    """What a launcher tells a process: who it is and where the first one waits for the others."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int


def launched_meeting() -> Meeting:
    """Where this process is to go; alone if no launcher says otherwise.

    Raises:
        ValueError: A launcher says which process this is, but not all that is needed.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    missing = [name for name in GIVEN if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set in the environment, {', '.join(missing)} not: start with deepspeed or torchrun")
    rank, local_rank, world_size, address, port = (os.environ[name] for name in GIVEN)
    return Meeting(int(rank), int(local_rank), int(world_size), address, int(port))


def start_processes(timeout_minutes: int) -> Environment:
    """Join the process group: NCCL with a GPU, gloo without; alone if no launcher says otherwise.

    Args:
        timeout_minutes: How long a process waits for another one before it gives up.

    Raises:
        ValueError: A launcher says which process this is, but not all that is needed, or where they meet is taken.
    """
    meeting = launched_meeting()
    # the loader's processes are forked from one that has used the tokenizer, and do not use it themselves
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # DeepSpeed's conversion of checkpoints asks torch.load to run what a file holds
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    _silence_others()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", meeting.local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    else:
        # a minute of compiling for an all-reduce that only inference uses
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    try:
        deepspeed.init_distributed("nccl" if has_gpu else "gloo", timeout=timeout, verbose=False)
    except torch.distributed.DistNetworkError as error:
        place = f"{meeting.address}:{meeting.port}"
        raise ValueError(f"processes cannot meet at {place} ({error}); start with another --master_port") from error
    return Environment(meeting.rank, meeting.local_rank, meeting.world_size, device)


def is_batch_job() -> bool:
    """Whether SLURM runs this, whose output is a file."""
    return "SLURM_JOB_ID" in os.environ


def place_wandb(folder: Path) -> None:
    """Let wandb write into a run's folder alone; before it is imported, for then it looks.

    Raises:
        OSError: The folder cannot be written.
    """
    own = (folder / "wandb").absolute()
    places = {"WANDB_DIR": own.parent, **{f"WANDB_{kind}_DIR": own / kind.lower() for kind in WANDB_FOLDERS}}
    for name, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(place)
    # wandb itself would go to another place in silence
    tempfile.TemporaryFile(dir=own).close()
    # its service is no Python: it knows no other place where /tmp cannot be written
    os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    # one that was inherited still holds on to the id of a run that was killed in it
    os.environ.pop("WANDB_SERVICE", None)


def wandb_mode(asked: str) -> str:
    """online, offline or disabled; where it is not said, as WANDB_MODE says, or online where there is a key."""
    if asked != "auto":
        return asked
    given = os.environ.get("WANDB_MODE", "")
    return given if given in WANDB_MODES else "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether wandb will find a key, in the environment or where `wandb login` puts it."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return bool(os.environ.get("WANDB_API_KEY")) or host in known


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: where it is fast, unless told otherwise.

    Raises:
        ValueError: It was asked for on a GPU that does not have it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError("--precision bf16: this GPU does not have it, use fp32")
    return has_bf16 if precision == "auto" else precision == "bf16"


def _silence_others() -> None:
    """Keep off the terminal what is of no use there: a bar for each file, and what DeepSpeed will have to change."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed calls collectives by names that newer PyTorch gives up
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning, r"torch\.distributed\.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
