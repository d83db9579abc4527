"""Several at a time: each thread takes the next item when it is done with the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from threading import Condition
from typing import TypeVar

import torch

Item = TypeVar("Item")
Place = TypeVar("Place")
T = TypeVar("T")


class _Turns:
    """Numbers from 0, which may end in any order."""

    def __init__(self) -> None:
        self._ended: set[int] = set()
        self._first = 0  # that has not ended
        self._changed = Condition()

    def wait_for(self, number: int) -> None:
        """Until all before have ended; they have begun, so that they will."""
        with self._changed:
            self._changed.wait_for(lambda: self._first >= number)

    def end(self, number: int) -> None:
        """Once for each."""
        with self._changed:
            self._ended.add(number)
            while self._first in self._ended:
                self._ended.remove(self._first)
                self._first += 1
            self._changed.notify_all()


@contextmanager
def map_in_threads(
    work: Callable[[Item, Place, Callable[[], None]], T],
    items: Iterable[Item],
    places: Sequence[Place],
    broken_off: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Iterator[T]]:
    """`work` on every item, as many at a time as there are places, which no two have at once.

    Each is also given a function to call before what is to be done in the items' order: it waits until all work on
    those before is over.

    It goes on within the `with`, which is given the results, in order; what `work` raises is raised when its turn
    comes. Who leaves early waits for what runs, and what has not begun is let go. Should whoever waits be interrupted
    (Ctrl-C), what runs is waited for within `broken_off()`, which is to have it end soon.

    They share torch's threads. Two that compute on one core each wait for nobody, where two threads on one matrix wait
    for each other at the end of every operation.
    """
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    turns = _Turns()

    def run(number: int, item: Item) -> T:
        place = free.get()
        try:
            return work(item, place, partial(turns.wait_for, number))
        finally:
            free.put(place)
            turns.end(number)

    workers, threads = max(len(places), 1), torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "obfuscatune-load", torch.set_num_threads, (max(threads // workers, 1),))
    leaving: AbstractContextManager[None] = nullcontext()
    try:
        results = [pool.submit(run, number, item) for number, item in enumerate(items)]
        yield (result.result() for result in results)
    except Exception:
        raise
    except BaseException:
        leaving = broken_off()
        raise
    finally:
        with leaving:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads to come: the pool's have set it to their share
