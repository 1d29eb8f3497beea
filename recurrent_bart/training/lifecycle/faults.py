"""Error messages for failures during training. Each message says what the user can do."""

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

# texts in the errors of gloo and NCCL when another process has ended or does not answer
LOST_CONTACT = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl", "socket closed")

# error numbers of a full disk and of an exhausted quota
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Fault(RuntimeError):  # noqa: N818, named as its exit code is
    """Error that is not a mistake in a flag or a file. Its message is complete without a traceback."""


@contextlib.contextmanager
def explain_out_of_memory(batch: Batch, step: int) -> Iterator[None]:
    """Replace an out-of-memory error by a Fault, whose message names the batch size and the flags that save memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        n_documents, n_segments, n_tokens = batch.input_ids.shape
        raise Fault(
            f"step {step}: out of memory on rank {rank()} with {n_documents} documents of {n_segments} segments of "
            f"{n_tokens} tokens and targets of {batch.labels.shape[-1]} tokens; lower --per_device_train_batch_size or "
            "--tokens_per_batch (and raise --gradient_accumulation_steps), use --gradient_checkpointing segment, lower "
            "--max_n_segments, --context_segments or --bptt_depth, or shard more: --deepspeed "
            f"ds_configs/zero3_offload.json ({_first_line(error)})"
        ) from error


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Replace a write error by a Fault, whose message names the file, the free space and how to resume."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__cause__, OSError):
            raise
        free = shutil.disk_usage(path.parent).free
        raise Fault(
            f"{path} cannot be written ({_first_line(error)}; {free:,} bytes of disk space are free). Earlier files "
            "are undamaged: free disk space, then continue from the last checkpoint with --resume"
        ) from error


@contextlib.contextmanager
def explain_loader_errors() -> Iterator[None]:
    """Raise a data loader worker's ValueError again with only its last line, without the worker's traceback."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def describe_fault(error: Exception) -> str:
    """Return the text to print for an error that ended this process: one line if possible, else the traceback."""
    if isinstance(error, (Fault, CheckpointError, RunLockLostError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"the disk is full: {error}; free disk space, then continue a started run with --resume"
    # PyTorch raises this error in a signal handler, at any line of the main process
    if str(error).startswith("DataLoader worker"):
        return (
            f"a data loader process has ended ({_first_line(error)}); if the CPU memory was full, lower "
            "--dataloader_num_workers"
        )
    if is_lost_rank(error):
        return f"another process has ended or does not answer; see the message of that process ({_first_line(error)})"
    return "".join(traceback.format_exception(error)).rstrip()


def is_lost_rank(error: BaseException) -> bool:
    """Return True if the error only reports that another process is lost."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in LOST_CONTACT)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
