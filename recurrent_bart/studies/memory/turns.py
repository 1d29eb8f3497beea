"""Several pieces of work in one process, in turns, so that none waits for the device while another can go on."""

import gc
import itertools
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
# work in turns: what one has begun on the device is done when the next begins
Turns: TypeAlias = Generator[None, None, Result]


def all_turns(turns: Turns[Result]) -> Result:
    """What comes of work whose turns follow each other at once."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def take_turns(
    items: Iterable[Item], begin: Callable[[Item], Turns[None]], n_at_once: int, device: torch.device
) -> Iterator[tuple[Item, str | None]]:
    """Do the work of several items, some of them at once, and give each item as its work ends.

    On a GPU each has a stream of its own, and its turn when all in it is done. Work that fails leaves the others alone.

    Args:
        items: Asked for the next when there is room for it.
        begin: Gives an item's work; nothing of it is done yet.
        n_at_once: Most items at once.
        device: Where work is done.

    Returns:
        Items, with the error that ended their work, in a line; None: it came to its end.
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
                # recordings, which hold memory of the device, are parts of cycles
                gc.collect()
                yield item, error


def _take_turn(turns: Turns[None], stream: torch.cuda.Stream | None) -> tuple[bool, str | None]:
    """Whether the work has ended with this turn, and by which error."""
    try:
        with torch.cuda.stream(stream):
            next(turns)
    except StopIteration:
        return True, None
    except Exception as error:
        traceback.print_exc()
        return True, " ".join(f"{type(error).__name__}: {error}".split())
    return False, None
