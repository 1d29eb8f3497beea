"""What processes tell each other. Works without a process group, as the only process."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class SharedError(ValueError):
    """An error that another process met first and reports."""


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 for the one that prints and writes."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def sum_over_ranks(*values: float, device: torch.device | None = None) -> list[float]:
    """Each value summed over all processes."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int, device: torch.device | None = None) -> int:
    """The largest of all processes' values."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_rows(row: Sequence[float], device: torch.device | None = None) -> list[list[float]]:
    """Every process's numbers, as many of each, in order of rank; one collective."""
    if not is_distributed():
        return [list(row)]
    rows = torch.empty(world_size() * len(row), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(rows, torch.tensor(row, dtype=torch.float64, device=device))
    return rows.view(world_size(), len(row)).tolist()


def gather_objects(item: Any) -> list[Any]:
    """Every process's item, in order of rank."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first(item: Result | None) -> Result:
    """The first process's item, on every process."""
    if not is_distributed():
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        dist.barrier()


def set_timeout(timeout: timedelta) -> None:
    """How long this process waits for another one from now on, in every group there is."""
    if is_distributed():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def first_then_all(make: Callable[[], Result]) -> Result:
    """Let the first process do something before all others do it, to find it in a cache.

    Raises:
        ValueError: A process met one. The first one raises it, or says whose it was; the others stop with it
            (SharedError) instead of waiting for ever. Errors of any other kind are shared likewise.
    """
    if is_first():
        result, error = _attempt(make)
    message = from_first(None if not is_first() or error is None else str(error))
    if message is None and not is_first():
        result, error = _attempt(make)
    if is_first() and error is not None:
        raise error
    if message is not None:
        raise SharedError(message)
    _raise_shared(error)
    return result


def all_together(make: Callable[[], Result]) -> Result:
    """Let every process do something at the same time; a ValueError of one stops all, and the first one raises it.

    Raises:
        ValueError: A process met one; on all but the first process a SharedError.
    """
    error: ValueError | None = None
    try:
        result = make()
    except ValueError as met:
        error = met
    texts = gather_objects(None if error is None else str(error))
    if all(text is None for text in texts):
        return result
    number = next(number for number, text in enumerate(texts) if text is not None)
    where = "" if None not in texts else f"process {number}: "
    raise (ValueError if is_first() else SharedError)(f"{where}{texts[number]}") from error


def only_first(act: Callable[[], Any]) -> None:
    """Let the first process alone do something; its ValueError stops all, as in `first_then_all`."""
    first_then_all(lambda: act() if is_first() else None)


def stop_all(message: str) -> NoReturn:
    """End all processes, which all call it, with what the first one says.

    Raises:
        ValueError: Always.
    """
    raise (ValueError if is_first() else SharedError)(message)


def log_on_first_rank(seconds: float) -> None:
    """Wait before leaving with an error that the first process reports.

    A launcher ends all processes with the first that leaves. Where that was another one, nobody would say why.
    """
    time.sleep(seconds)


def _attempt(make: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _raise_shared(error: Exception | None) -> None:
    """Stop all processes if any one met an error."""
    met = [text for text in gather_objects(None if error is None else f"process {rank()}: {error}") if text]
    if met:
        raise (ValueError if is_first() else SharedError)(met[0]) from error
