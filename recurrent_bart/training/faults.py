"""What goes wrong while a run trains, told so that somebody can act on it."""

import contextlib
import traceback
from collections.abc import Iterator

import torch

from recurrent_bart.checkpointing.checkpoints import CheckpointError
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import rank

# what gloo and NCCL say where another process ended, or does not answer
LOST_CONTACT = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "nccl", "socket closed")


class Fault(RuntimeError):  # noqa: N818, named as its exit code is
    """One that is no mistake in a flag or a file; its message says all there is to say."""


@contextlib.contextmanager
def telling_out_of_memory(batch: Batch, step: int) -> Iterator[None]:
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
def telling_of_batches() -> Iterator[None]:
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
    if isinstance(error, (Fault, CheckpointError)):
        return str(error)
    # raised wherever this process was just then
    if str(error).startswith("DataLoader worker"):
        return (
            f"a process that makes batches has ended ({_first_line(error)}); where memory was not enough for it, lower "
            "--dataloader_num_workers"
        )
    if has_lost_contact(error):
        return f"another process has ended or does not answer; its own message says why ({_first_line(error)})"
    return "".join(traceback.format_exception(error)).rstrip()


def has_lost_contact(error: BaseException) -> bool:
    """Whether it tells of another process alone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in LOST_CONTACT)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
