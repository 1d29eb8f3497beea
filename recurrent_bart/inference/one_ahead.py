"""Computation of the next result in a thread, while the caller works with the current result."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result. A thread computes the next result while the caller works with the current one.

    The items are taken in the caller's thread, one ahead. An error of `items` or `function` is raised in place of its
    item; no item is taken after an error of `items`.
    """
    source = iter(items)

    def begin() -> tuple[Any, Future[Result]] | None:
        try:
            item = next(source)
        except StopIteration:
            return None
        except Exception as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return None, failed
        return item, pool.submit(function, item)

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = begin()
        while following is not None:
            item, pending = following
            result = pending.result()
            following = begin()
            yield item, result
