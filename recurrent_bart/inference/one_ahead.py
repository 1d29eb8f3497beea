"""Computation of the next item in a thread, while the caller works with the current item."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items. A thread computes the next item while the caller works with the current one.

    An error in the computation of an item is raised in place of the item. No item is computed after it.
    """
    iterator, end = iter(items), object()
    following: tuple[Any, ...] = (next, iterator, end)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(*following)
        while (item := pending.result()) is not end:
            pending = pool.submit(*following)
            yield item
