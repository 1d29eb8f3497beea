"""How the files of a checkpoint are written and read, DeepSpeed's among them."""

import contextlib
import functools
import json
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

# what DeepSpeed's files hold beside tensors, numbers, texts and their containers
HARMLESS = (LossScaler, ZeroStageEnum, fragment_address)


def read_tensors(path: str | Path, map_location: Any = None) -> Any:
    """What a file holds. It is never run: a file that asks for it is refused.

    Raises:
        ValueError: It holds something else than tensors, plain values and DeepSpeed's own few classes.
    """
    try:
        with refuse_code():
            return torch.load(path, map_location=map_location, weights_only=True)
    # what a pickle that is refused is refused with
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def refuse_code() -> Iterator[None]:
    """While it lasts, torch.load takes DeepSpeed's own few classes beside tensors and plain values."""
    # its own context manager takes them away at the end of an inner one
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(HARMLESS))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def enums_as_values(item: Any) -> Any:
    """The same with plain values for members of enumerations, which some versions of Python pickle as calls."""
    if isinstance(item, Enum):
        return item.value
    if type(item) is dict:
        return {name: enums_as_values(value) for name, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(map(enums_as_values, item))
    return item


class CheckpointFiles(CheckpointEngine):
    """Takes the place of DeepSpeed's own checkpoint engine: it gathers what a process has to write, then writes it.

    Writing has a thread of its own. Whoever waits for it at once writes as if there were none.

    Args:
        copies: Gather a copy in the processor's memory, so that training may go on while it is written.
    """

    def __init__(self, copies: bool):
        super().__init__()
        self.copies = copies
        self.gathered: list[tuple[Path, Callable[[Any], Any]]] = []
        # joined when the process ends by itself: what was begun is written
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed begins."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """DeepSpeed has handed over everything."""
        return True

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Take note of what is to be written where."""
        item = enums_as_values(clone_tensors_for_torch_save(state_dict) if self.copies else state_dict)
        self.gathered.append((Path(path), functools.partial(torch.save, item)))

    def save_json(self, content: Any, path: Path) -> None:
        """Take note of plain values that are to be written."""
        text = json.dumps(content).encode()
        self.gathered.append((path, lambda file: file.write(text)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read what was written."""
        return read_tensors(path, map_location)

    def write(self, folder: Path, rank: int, then: Callable[[], None]) -> Future[None]:
        """Begin to write what was gathered, and this process's part of the manifest.

        Args:
            folder: Of the checkpoint.
            rank: Of this process.
            then: Called after that.
        """
        gathered, self.gathered = self.gathered, []
        return self.writer.submit(_write, folder, rank, gathered, then)


def _write(
    folder: Path, rank: int, gathered: Sequence[tuple[Path, Callable[[Any], Any]]], then: Callable[[], None]
) -> None:
    write_part(folder, rank, {str(path.relative_to(folder)): write_and_fsync(path, write) for path, write in gathered})
    then()
