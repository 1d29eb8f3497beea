"""Scheduler that lets several runs take turns in one process, so that the GPU always has queued kernels."""

import gc
import itertools
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# Work as a generator that yields after each turn. Kernels of a turn finish before the next turn of the same work.
Turns: TypeAlias = Generator[None, None, Result]


def take_turns(
    items: Iterable[Item], begin: Callable[[Item], Turns[None]], n_at_once: int, device: torch.device
) -> Iterator[tuple[Item, str | None]]:
    """Work on up to `n_at_once` items in turns. Yield each finished item with its error as one line, or None.

    `begin` creates the work for an item without starting the work. The next item is requested when there is room. On a
    GPU, the work for each item has its own CUDA stream, and takes a turn only when that stream is idle. An error ends
    the work for one item only.
    """
    waiting = iter(items)
    free = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(n_at_once)]
    taken: list[tuple[Item, Turns[None], torch.cuda.Stream | None]] = []
    while True:
        taken += [(item, begin(item), free.pop()) for item in itertools.islice(waiting, len(free))]
        if not taken:
            return
        for place in list(taken):
            item, turns, stream = place
            if stream is not None and not stream.query():
                continue
            has_ended, error = _take_turn(turns, stream)
            if has_ended:
                taken.remove(place)
                free.append(stream)
                # CUDA graphs hold GPU memory, and only the garbage collector frees graphs that are in reference cycles
                gc.collect()
                yield item, error


def _take_turn(turns: Turns[None], stream: torch.cuda.Stream | None) -> tuple[bool, str | None]:
    """Run one turn. Return True if the work has ended, and the error that ended the work, or None."""
    try:
        with torch.cuda.stream(stream):
            next(turns)
    except StopIteration:
        return True, None
    except Exception as error:
        traceback.print_exc()
        return True, " ".join(f"{type(error).__name__}: {error}".split())
    return False, None
