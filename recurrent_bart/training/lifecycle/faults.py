"""What goes wrong while a run trains, told so that somebody can act on it."""

import contextlib
import errno
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from recurrent_bart.checkpointing.checkpoints import CheckpointError
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import rank
from recurrent_bart.training.lifecycle.run_lock import RunLockLostError

# what gloo and NCCL say where another process ended, or does not answer
LOST_CONTACT = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl", "socket closed")

# what a full disk or a used-up quota is told as
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Fault(RuntimeError):  # noqa: N818, named as its exit code is
    """One that is no mistake in a flag or a file; its message says all there is to say."""


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, step: int) -> Iterator[None]:
    """Say what did not fit in the memory of the device, and what makes it smaller.

    Raises:
        Fault: There was not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        n_documents, n_segments, n_tokens = batch.input_ids.shape
        raise Fault(
            f"step {step}: out of memory on rank {rank()} with {n_documents} documents of {n_segments} segments of "
            f"{n_tokens} tokens and targets of {batch.labels.shape[-1]} tokens; lower --per_device_train_batch_size or "
            "--tokens_per_batch (and raise --gradient_accumulation_steps), use --gradient_checkpointing segment, lower "
            "--bptt_depth or --max_n_segments, or shard more: --deepspeed ds_configs/zero3_offload.json "
            f"({_first_line(error)})"
        ) from error


@contextlib.contextmanager
def telling_of_disk(path: Path) -> Iterator[None]:
    """Say what could not be written, and that the run can go on.

    Raises:
        Fault: A file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__cause__, OSError):
            raise
        free = shutil.disk_usage(path.parent).free
        raise Fault(
            f"{path} cannot be written ({_first_line(error)}; {free:,} bytes are free); what stood there before is "
            "whole, and --resume goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def explain_loader_errors() -> Iterator[None]:
    """Say what another process met that makes batches, without what lies between it and this one.

    Raises:
        ValueError: It met one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def describe_fault(error: Exception) -> str:
    """What to print of an error that ended this process: a line where that says all, else where it came from."""
    if isinstance(error, (Fault, CheckpointError, RunLockLostError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"the disk is full: {error}; make room, and --resume where a run has begun"
    # raised wherever this process was just then
    if str(error).startswith("DataLoader worker"):
        return (
            f"a process that makes batches has ended ({_first_line(error)}); where memory was not enough for it, lower "
            "--dataloader_num_workers"
        )
    if is_lost_rank(error):
        return f"another process has ended or does not answer; its own message says why ({_first_line(error)})"
    return "".join(traceback.format_exception(error)).rstrip()


def is_lost_rank(error: BaseException) -> bool:
    """Whether it tells of another process alone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in LOST_CONTACT)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
