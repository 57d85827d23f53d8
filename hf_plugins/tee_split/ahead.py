"""An iterator that works ahead of its reader in a thread, by a bounded number of items."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def ahead(source: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """Iterate over ``source`` while a thread computes up to ``depth`` items ahead.

    An exception of the source is raised where its item would have come. A generator that is closed or dropped
    lets the thread end after the item it is at.

    Args:
        source: Iterated in the thread.
        depth: Items that may wait; 0 works in step with the reader, without a thread.

    Returns:
        The items, in order.
    """
    if depth == 0:
        yield from source
        return
    iterator = iter(source)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tee-split-ahead")
    try:
        waiting = deque(worker.submit(next, iterator, _END) for _ in range(depth))
        while True:
            item = waiting.popleft().result()
            if item is _END:
                return
            waiting.append(worker.submit(next, iterator, _END))
            yield item  # type: ignore[misc]
    finally:
        worker.shutdown(wait=False, cancel_futures=True)
