"""Overlapping the work on successive tensors within a budget of bytes."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
WORKERS = 2  # hashing, copying and I/O release the GIL; more only fill memory


@contextlib.contextmanager
def bounded_map(
    function: Callable[[Item], Result], items: Iterable[Item], size_of: Callable[[Item], int], budget: int
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """An iterator over (item, function(item)) in order, computed ahead by a few threads, which end with the context.

    The sizes of the items that are submitted and not yet done with (the consumer has not asked for the next one) add
    up to at most `budget`, except that one item may always run.
    """
    results = _results(function, items, size_of, budget)
    # Left to the collector after an error, it might be closed by one of its own threads, which cannot wait for itself.
    with contextlib.closing(results):
        yield results


def _results(function, items, size_of, budget):
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
