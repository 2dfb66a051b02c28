"""Overlapping the work on successive tensors within a budget of bytes."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
WORKERS = 2  # hashing, copying and I/O release the GIL; more only fill memory


def bounded_map(
    function: Callable[[Item], Result], items: Iterable[Item], size_of: Callable[[Item], int], budget: int
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, function(item)) in order, computed ahead by a few threads.

    The sizes of the items that are submitted and not yet done with (the consumer has not asked for the next one) add
    up to at most `budget`, except that one item may always run.
    """
    pending, in_flight = collections.deque(), 0
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for item in items:
            while pending and (len(pending) > 2 * WORKERS or in_flight + size_of(item) > budget):
                yield _pop(pending)
                in_flight -= size_of(pending.popleft()[0])
            pending.append((item, pool.submit(function, item)))
            in_flight += size_of(item)
        while pending:
            yield _pop(pending)
            pending.popleft()
    finally:
        for _, future in pending:
            future.cancel()
        pool.shutdown(wait=True)


def _pop(pending):
    item, future = pending[0]
    return item, future.result()
