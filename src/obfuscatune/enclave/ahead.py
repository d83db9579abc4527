"""One step ahead: while a result is used, a thread makes the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(steps: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """What each step returns, in order.

    A step begins when the result before it is handed out, and so not before the one before that is done with: two
    results that share no memory are all that there ever are. What a step raises is raised when its turn comes. To be
    closed when it is left early (`contextlib.closing`), which waits for the step that runs.
    """
    with ThreadPoolExecutor(1, "obfuscatune-ahead") as maker:
        upcoming: Future[T] | None = None
        for step in steps:
            if upcoming is None:
                upcoming = maker.submit(step)
                continue
            ready = upcoming.result()
            upcoming = maker.submit(step)
            yield ready
        if upcoming is not None:
            yield upcoming.result()
