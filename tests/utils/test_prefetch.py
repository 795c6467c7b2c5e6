"""Items made ahead: the same ones in the same order, no more than asked, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ambient_sd.utils.prefetch import ahead


def counting(made: list[int], n: int = 10, fails_at: int | None = None) -> Iterator[int]:
    for i in range(n):
        if i == fails_at:
            raise ValueError("broken image")
        made.append(i)
        yield i


def test_items_come_in_order_from_another_thread() -> None:
    threads: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(5):
            threads.add(threading.get_ident())
            yield i

    assert list(ahead(items())) == [0, 1, 2, 3, 4]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_as_many_as_asked_wait_and_no_more() -> None:
    made: list[int] = []
    items = ahead(counting(made), depth=2)
    assert made == [], "nothing is made before the first is asked for"
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_comes_at_its_place() -> None:
    made: list[int] = []
    items = ahead(counting(made, fails_at=2))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="broken image"):
        next(items)
    assert made == [0, 1]
