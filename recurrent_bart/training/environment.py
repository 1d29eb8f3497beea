"""The process that we are in: its rank, its device, its process group. The one place that reads `os.environ`."""

import configparser
import logging
import netrc
import os
import socket
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import deepspeed
import deepspeed.comm
import torch
import transformers

from recurrent_bart.monitoring.wandb_tracker import parse_wandb_mode
from recurrent_bart.training.zero.deepspeed_patches import skip_shared_memory_operator

# what a launcher tells each process
GIVEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# what wandb keeps beside its runs
WANDB_FOLDERS = ("CACHE", "CONFIG", "DATA")
WANDB_SERVICE = "https://api.wandb.ai"
TRUE_VALUES = ("1", "on", "yes", "true")


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
class Rendezvous:
    """What a launcher tells a process: who it is and where the first one waits for the others."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int


def launched_rendezvous() -> Rendezvous:
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
    return Rendezvous(int(rank), int(local_rank), int(world_size), address, int(port))


def start_processes(timeout_minutes: int) -> Environment:
    """Join the process group: NCCL with a GPU, gloo without; alone if no launcher says otherwise.

    Args:
        timeout_minutes: How long a process waits for another one before it gives up.

    Raises:
        ValueError: A launcher says which process this is, but not all that is needed, or where they meet is taken.
    """
    meeting = launched_rendezvous()
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
        skip_shared_memory_operator()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        deepspeed.init_distributed("nccl" if has_gpu else "gloo", timeout=timeout, verbose=False)
    except torch.distributed.DistNetworkError as error:
        place = f"{meeting.address}:{meeting.port}"
        raise ValueError(
            f"processes cannot meet at {place} ({error}); give the launcher another port: `deepspeed --master_port "
            "PORT launch/train.py ...`, or likewise `torchrun --master_port PORT`"
        ) from error
    return Environment(meeting.rank, meeting.local_rank, meeting.world_size, device)


def end_processes() -> None:
    """Wait for all processes and leave their group."""
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


def is_batch_job() -> bool:
    """Whether SLURM runs this, whose output is a file."""
    return "SLURM_JOB_ID" in os.environ


def batch_job() -> tuple[str, int]:
    """Return the id of the batch job that runs this, empty if there is none, and how often it was requeued."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def set_wandb_folders(folder: Path, given: Mapping[str, str]) -> None:
    """Let wandb write into the folder of a run only. Call it before wandb is imported.

    wandb then no longer finds its own settings file, so its settings are handed on as environment variables.

    Args:
        folder: Folder of the run.
        given: Settings of `wandb_settings`.

    Raises:
        OSError: The folder cannot be written.
    """
    for name, value in given.items():
        os.environ.setdefault(f"WANDB_{name.upper()}", value)
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
    # the mode is an argument of wandb.init; wandb refuses to start if this one is not spelt as it spells it
    os.environ.pop("WANDB_MODE", None)


def wandb_settings() -> dict[str, str]:
    """Return the settings that the user gave wandb itself, by name: `project` for the variable WANDB_PROJECT.

    Variables take precedence over the settings files that `wandb offline` and `wandb login --host` write.
    """
    system = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    workspace = Path(os.environ.get("WANDB_DIR", ".")).expanduser()
    files = configparser.ConfigParser(interpolation=None)
    try:
        files.read([system / "settings", workspace / "wandb" / "settings"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        # wandb, too, takes a damaged file for an empty one
        files.clear()
    saved = dict(files["default"]) if files.has_section("default") else {}
    prefix = "WANDB_"
    variables = {name[len(prefix) :].lower(): text for name, text in os.environ.items() if name.startswith(prefix)}
    return {name: text for name, text in (saved | variables).items() if text.strip()}


def wandb_mode(asked: str, given: Mapping[str, str]) -> str:
    """Return online, offline or disabled: the flag, else what the user told wandb, else online if there is a key.

    Args:
        asked: The flag `--wandb_mode`.
        given: Settings of `wandb_settings`.

    Raises:
        ValueError: wandb was told a mode that does not exist.
    """
    if asked != "auto":
        return asked
    if given.get("disabled", "").strip().lower() in TRUE_VALUES:
        return "disabled"
    if "mode" in given:
        return parse_wandb_mode(given["mode"])
    return "online" if has_wandb_key(given) else "offline"


def has_wandb_key(given: Mapping[str, str]) -> bool:
    """Return True if wandb will find an API key, in the environment or where `wandb login` puts it.

    Args:
        given: Settings of `wandb_settings`.
    """
    host = urlsplit(given.get("base_url", WANDB_SERVICE)).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return "api_key" in given or host in known


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
