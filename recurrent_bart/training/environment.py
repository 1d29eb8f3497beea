"""Environment of this process: rank, device, process group. Only this module reads `os.environ`."""

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

import torch
import transformers

from recurrent_bart.monitoring.wandb_tracker import parse_wandb_mode

# environment variables that a launcher sets for each process
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# kinds of folders that wandb has besides its runs
WANDB_FOLDERS = ("CACHE", "CONFIG", "DATA")
WANDB_SERVICE = "https://api.wandb.ai"
TRUE_VALUES = ("1", "on", "yes", "true")


@dataclass(frozen=True)
class Environment:
    """Rank and device of this process.

    Attributes:
        rank: Rank of the process over all hosts.
        local_rank: Rank on this host, and index of the GPU.
        world_size: Number of processes.
        device: Device on which the process computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def launched_rank() -> int:
    """Return the rank that the launcher set, even without a process group."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class Rendezvous:
    """Rank of a process, with the network address at which rank 0 waits for all other ranks."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int


def launched_rendezvous() -> Rendezvous:
    """Return this process's rank and rank 0's address, as set by the launcher. Without a launcher, the rank is 0.

    Raises:
        ValueError: The launcher set RANK, but not all other variables.
    """
    if "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single | {"MASTER_PORT": str(_free_port())})
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}: start the script with deepspeed or torchrun")
    rank, local_rank, world_size, address, port = (os.environ[name] for name in LAUNCHER_VARIABLES)
    return Rendezvous(int(rank), int(local_rank), int(world_size), address, int(port))


def start_processes(timeout_minutes: int, with_deepspeed: bool = True) -> Environment:
    """Join the process group, with NCCL on GPUs and gloo on CPUs. Without a launcher, the group has one process.

    `timeout_minutes` limits how long a process waits for another one. Only training needs DeepSpeed.

    Raises:
        ValueError: The launcher set RANK, but not all other variables, or the port of the rendezvous is in use.
    """
    rendezvous = launched_rendezvous()
    # the tokenizers library would warn: data loader workers are forked after this process has used the tokenizer; the
    # workers do not use the tokenizer
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    refuse_pickled_code()
    _silence_libraries()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rendezvous.local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    join = _join_with_deepspeed if with_deepspeed else _join
    try:
        join("nccl" if has_gpu else "gloo", timeout)
    except torch.distributed.DistNetworkError as error:
        address = f"{rendezvous.address}:{rendezvous.port}"
        raise ValueError(
            f"processes cannot connect at {address} ({error}); give the launcher a different port: `deepspeed "
            "--master_port PORT launch/train.py ...` or `torchrun --master_port PORT launch/train.py ...`"
        ) from error
    return Environment(rendezvous.rank, rendezvous.local_rank, rendezvous.world_size, device)


def _join(backend: str, timeout: timedelta) -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=timeout)


def _join_with_deepspeed(backend: str, timeout: timedelta) -> None:
    # import late: reading and evaluating need no DeepSpeed
    import deepspeed

    from recurrent_bart.training.zero.deepspeed_patches import skip_shared_memory_operator

    # hide DeepSpeed's progress bars, one per file, and its messages that only its developers can act on
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if backend == "gloo":
        skip_shared_memory_operator()
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def refuse_pickled_code() -> None:
    """Make `torch.load` refuse code in a file. DeepSpeed calls it with `weights_only=False`, which could run code."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def end_processes() -> None:
    """Wait for all processes and destroy the process group."""
    import deepspeed.comm

    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


def is_batch_job() -> bool:
    """Return True in a SLURM job, whose output goes to a file."""
    return "SLURM_JOB_ID" in os.environ


def batch_job() -> tuple[str, int]:
    """Return the SLURM job id (empty outside a job), and the number of times that SLURM requeued the job."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def set_wandb_environment(folder: Path, given: Mapping[str, str], is_online: bool) -> None:
    """Make wandb write only into the run folder, and send nothing unless it is online.

    Call this before wandb is imported. wandb then no longer finds the user's settings files, so the settings from
    `wandb_settings` are passed as environment variables.

    Raises:
        OSError: The folder cannot be written.
    """
    for name, value in given.items():
        os.environ.setdefault(f"WANDB_{name.upper()}", value)
    own = (folder / "wandb").absolute()
    directories = {"WANDB_DIR": own.parent, **{f"WANDB_{kind}_DIR": own / kind.lower() for kind in WANDB_FOLDERS}}
    for name, directory in directories.items():
        directory.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(directory)
    # if the folder cannot be written, wandb would silently use another folder
    tempfile.TemporaryFile(dir=own).close()
    # wandb's service is not written in Python and finds no other folder if /tmp cannot be written
    os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    # a wandb service that another process started may still use the id of a killed run
    os.environ.pop("WANDB_SERVICE", None)
    # wandb.init gets the mode too; but wandb's own statistics, sent at the end of the process, follow this variable
    os.environ["WANDB_MODE"] = "online" if is_online else "offline"


def wandb_settings() -> dict[str, str]:
    """Return the user's wandb settings by name, for example `project` for the variable WANDB_PROJECT.

    Variables take precedence over the settings files that `wandb offline` and `wandb login --host` write.
    """
    system = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    workspace = Path(os.environ.get("WANDB_DIR", ".")).expanduser()
    files = configparser.ConfigParser(interpolation=None)
    try:
        files.read([system / "settings", workspace / "wandb" / "settings"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        # wandb also treats a damaged file as empty
        files.clear()
    saved = dict(files["default"]) if files.has_section("default") else {}
    prefix = "WANDB_"
    variables = {name[len(prefix) :].lower(): text for name, text in os.environ.items() if name.startswith(prefix)}
    return {name: text for name, text in (saved | variables).items() if text.strip()}


def wandb_mode(asked: str, given: Mapping[str, str]) -> str:
    """Return wandb's mode (online, offline or disabled) from the flag `--wandb_mode` and from `wandb_settings`.

    The flag has precedence over the settings. If neither names a mode, the mode is online with an API key and offline
    without one.

    Raises:
        ValueError: The settings name an unknown mode.
    """
    if asked != "auto":
        return asked
    if given.get("disabled", "").strip().lower() in TRUE_VALUES:
        return "disabled"
    if "mode" in given:
        return parse_wandb_mode(given["mode"])
    return "online" if has_wandb_key(given) else "offline"


def has_wandb_key(given: Mapping[str, str]) -> bool:
    """Return True if wandb will find an API key in `wandb_settings` or where `wandb login` stores it."""
    host = urlsplit(given.get("base_url", WANDB_SERVICE)).hostname
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return "api_key" in given or host in known


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return True if the run computes in bf16. Raise ValueError if `precision` is bf16 and the GPU lacks it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError("--precision bf16: this GPU does not support bf16; use --precision fp32")
    return has_bf16 if precision == "auto" else precision == "bf16"


def _silence_libraries() -> None:
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed uses names of collectives that newer PyTorch deprecates
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning, r"torch\.distributed\.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
