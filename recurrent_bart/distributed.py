"""Communication between ranks. Without a process group, each function acts as on a single rank."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


class SharedError(ValueError):
    """Error that stops this rank because of an error on another rank."""


def is_distributed() -> bool:
    """Return True if there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the rank of this process. Rank 0 prints and writes."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    """Return True on rank 0."""
    return rank() == 0


def sum_over_ranks(*values: float, device: torch.device | None = None) -> list[float]:
    """Sum each value over all ranks, in one float64 collective."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int, device: torch.device | None = None) -> int:
    """Return the largest `value` over all ranks."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_rows(row: Sequence[float], device: torch.device | None = None) -> list[list[float]]:
    """Gather one list of numbers per rank in one float64 collective. The lists must have the same length."""
    if not is_distributed():
        return [list(row)]
    rows = torch.empty(world_size() * len(row), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(rows, torch.tensor(row, dtype=torch.float64, device=device))
    return rows.view(world_size(), len(row)).tolist()


def gather_objects(item: Any) -> list[Any]:
    """Gather an object from each rank, in order of rank."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first(item: Result | None) -> Result:
    """Return rank 0's object on every rank."""
    if not is_distributed():
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def barrier() -> None:
    """Wait until every rank has called this function."""
    if is_distributed():
        dist.barrier()


def set_timeout(timeout: timedelta) -> None:
    """Set the timeout of later collectives in all process groups."""
    if is_distributed():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def first_then_all(make: Callable[[], Result]) -> Result:
    """Run a function on rank 0, then on all other ranks, which find the result of rank 0 in a cache.

    If the function fails on any rank, all ranks raise an error, so that no rank waits forever. Rank 0 raises its own
    error, or a ValueError that names the failed rank. All other ranks raise SharedError.
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


def run_on_all_ranks(make: Callable[[], Result]) -> Result:
    """Run a function on all ranks at the same time. A ValueError on any rank stops all ranks.

    After a ValueError on any rank, rank 0 raises ValueError and all other ranks raise SharedError.
    """
    error: ValueError | None = None
    try:
        result = make()
    except ValueError as met:
        error = met
    texts = gather_objects(None if error is None else str(error))
    if all(text is None for text in texts):
        return result
    failed_rank = next(rank for rank, text in enumerate(texts) if text is not None)
    prefix = "" if None not in texts else f"process {failed_rank}: "
    raise (ValueError if is_first() else SharedError)(f"{prefix}{texts[failed_rank]}") from error


def only_first(act: Callable[[], Any]) -> None:
    """Run a function on rank 0 alone. An error of the function stops all ranks, as in `first_then_all`."""
    first_then_all(lambda: act() if is_first() else None)


def stop_all(message: str) -> NoReturn:
    """Raise ValueError on rank 0 and SharedError on all other ranks. All ranks must call this function."""
    raise (ValueError if is_first() else SharedError)(message)


def log_on_first_rank(seconds: float) -> None:
    """Sleep before this rank exits with an error, so that rank 0 has time to print it.

    A launcher kills all processes when the first process exits.
    """
    time.sleep(seconds)


def _attempt(make: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        return None, error


def _raise_shared(error: Exception | None) -> None:
    met = [text for text in gather_objects(None if error is None else f"process {rank()}: {error}") if text]
    if met:
        raise (ValueError if is_first() else SharedError)(met[0]) from error
