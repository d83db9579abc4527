"""Chunks in threads: encryption, hashing and the disk all release the interpreter's lock."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from obfuscatune.machine import cores
from obfuscatune.sealing.keys import TAG_BYTES

MAX_THREADS = 8
"""Each holds two buffers of a chunk: 64 MiB for all, with chunks of 4 MiB."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Buffers(threading.local):
    """Room for one chunk, plain and encrypted: one of each for every thread."""

    def __init__(self, chunk_bytes: int) -> None:
        self.plain = memoryview(bytearray(chunk_bytes))
        self.sealed = memoryview(bytearray(chunk_bytes + TAG_BYTES))


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Generator[_Result, None, None]:
    """The results, in the order of the items, a few of which are worked on ahead. The first error ends it.

    Close it where it may be left early: no thread works on when it is closed.
    """
    threads = min(cores(), MAX_THREADS)
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="sealing") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
