"""Several at a time: each lane is a thread that takes the next item when it is done with the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from typing import TypeVar

import torch

Item = TypeVar("Item")
Place = TypeVar("Place")
T = TypeVar("T")


@contextmanager
def in_lanes(
    work: Callable[[Item, Place], T],
    items: Iterable[Item],
    places: Sequence[Place],
    broken_off: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Iterator[T]]:
    """`work` on every item, as many at a time as there are places, which no two have at once.

    It goes on within the `with`, which is given the results, in order; what `work` raises is raised when its turn
    comes. Who leaves early waits for what runs, and what has not begun is let go. Should whoever waits be interrupted
    (Ctrl-C), what runs is waited for within `broken_off()`, which is to have it end soon.

    Lanes share torch's threads. Two that compute on one core each wait for nobody, where two threads on one matrix wait
    for each other at the end of every operation.
    """
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    def run(item: Item) -> T:
        place = free.get()
        try:
            return work(item, place)
        finally:
            free.put(place)

    lanes, threads = max(len(places), 1), torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, "obfuscatune-lane", torch.set_num_threads, (max(threads // lanes, 1),))
    leaving: AbstractContextManager[None] = nullcontext()
    try:
        results = [pool.submit(run, item) for item in items]
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
