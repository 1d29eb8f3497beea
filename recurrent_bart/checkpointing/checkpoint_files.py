"""Reading and writing of the files in a checkpoint, including DeepSpeed's files."""

import contextlib
import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from recurrent_bart.checkpointing.manifest import write_and_fsync, write_part

# classes in DeepSpeed's files, besides tensors, numbers, strings and their containers
DEEPSPEED_CLASSES = (LossScaler, ZeroStageEnum, fragment_address)


def read_tensors(path: str | Path, map_location: Any = None) -> Any:
    """Load a file without running code from it. Raise ValueError if it holds more than tensors and plain values."""
    try:
        with refuse_code():
            return torch.load(path, map_location=map_location, weights_only=True)
    # torch.load raises many types of error for a refused pickle
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def refuse_code() -> Iterator[None]:
    """Let `torch.load` accept a few DeepSpeed classes besides tensors and plain values, within this block."""
    # PyTorch's context manager `safe_globals` cannot be nested: an inner block removes the classes of the outer block
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(DEEPSPEED_CLASSES))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@contextlib.contextmanager
def converting(path: Path) -> Iterator[None]:
    """Silence DeepSpeed's converters of the checkpoint at `path` within this block, and refuse code in its files.

    Raises:
        ValueError: A file holds an object that could run code.
    """
    # the converters print a page of text and progress bars
    with (
        open(os.devnull, "w") as null_device,
        contextlib.redirect_stdout(null_device),
        contextlib.redirect_stderr(null_device),
        refuse_code(),
    ):
        try:
            yield
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def enums_as_values(item: Any) -> Any:
    """Replace enum members by their values, because Python may pickle members as calls, which `refuse_code` refuses."""
    if isinstance(item, Enum):
        return item.value
    if type(item) is dict:
        return {name: enums_as_values(value) for name, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(map(enums_as_values, item))
    return item


class CheckpointFiles(CheckpointEngine):
    """DeepSpeed checkpoint engine that collects the contents of a rank's files, then writes the files in a thread.

    Args:
        copies: Copy the tensors to CPU memory, so that training can go on during the write.
    """

    def __init__(self, copies: bool):
        super().__init__()
        self.copies = copies
        self.gathered: list[tuple[Path, Callable[[Any], Any]]] = []
        # Python joins this thread when the process ends normally, so a started write is completed
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing: DeepSpeed calls this method before the first `save`."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return True: DeepSpeed calls this method after the last `save`."""
        return True

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Queue a state dictionary to be written to a file."""
        item = enums_as_values(clone_tensors_for_torch_save(state_dict) if self.copies else state_dict)
        self.gathered.append((Path(path), functools.partial(torch.save, item)))

    def save_json(self, content: Any, path: Path) -> None:
        """Queue plain values to be written to a JSON file."""
        text = json.dumps(content).encode()
        self.gathered.append((path, lambda file: file.write(text)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file that `save` wrote."""
        return read_tensors(path, map_location)

    def write(self, folder: Path, rank: int, then: Callable[[], None]) -> Future[None]:
        """Start to write the collected files and this rank's part of the manifest in a thread.

        The thread calls `then` after all files of the rank are written.
        """
        gathered, self.gathered = self.gathered, []
        return self.writer.submit(_write, folder, rank, gathered, then)


def _write(
    folder: Path, rank: int, gathered: Sequence[tuple[Path, Callable[[Any], Any]]], then: Callable[[], None]
) -> None:
    write_part(folder, rank, {str(path.relative_to(folder)): write_and_fsync(path, write) for path, write in gathered})
    then()
