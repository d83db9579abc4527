"""What a forked child must not share with its parent: a connection, a lock that a thread held, another process.

Of the parent's threads a child has only the one that forked, so a lock that another one held stays held for ever; and
bytes that both send on one connection, or write into one shared memory, would be taken for each other's.
"""

from __future__ import annotations

import functools
import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object that knows how to begin anew in a forked child."""

    def begin_in_child(self) -> None:
        """Called once in each forked child, in its only thread. Must not raise, and must not touch the parent's."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def begin_anew_in_children(forkable: Forkable) -> None:
    """From now on, `forkable.begin_in_child` is called in each forked child, for as long as the object lives."""
    _hook()
    _forkables.add(forkable)


@functools.cache
def _hook() -> None:
    """Once in a process, when the first such object is made."""
    os.register_at_fork(after_in_child=_begin_anew)


def _begin_anew() -> None:
    for forkable in list(_forkables):
        forkable.begin_in_child()
