"""Make the next items of an iterator while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield what an iterator yields; one thread makes up to `depth` items before they are asked for.

    Order and errors are the iterator's. Nothing is made before the first item is asked for; after an error, or when the generator is
    closed, no further item is begun.

    Args:
        items: used by the thread alone from now on.
        depth: how many items wait at most.

    Example:
        >>> list(ahead(iter("abc")))
        ['a', 'b', 'c']
    """
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
