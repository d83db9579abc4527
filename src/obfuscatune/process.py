"""How a process of ours sets itself up, before torch is imported. Shared.

Two defaults cost a protected run dearly, because enclave and worker take turns on the same cores:

- OpenMP threads that wait for work either spin, and take the core that the other process computes on, or sleep,
  and must be woken at every operation. They should spin for about as long as the gap between two operations.
- glibc gives each freed tensor of some size straight back to the kernel and faults it in again, page by page, at
  the next allocation. Kept in the heap, it is there at once. (On other C libraries nothing is done.)

And OpenMP starts as many threads as the host has cores, where the process is in a container that is given fewer.

`begin_anew_in_children` is for what a forked child must not share with its parent: a connection, a lock that a thread
held, another process.

Of the parent's threads a child has only the one that forked, so a lock that another one held stays held for ever; and
bytes that both send on one connection, or write into one shared memory, would be taken for each other's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import Protocol

from obfuscatune.machine import container_limits, cores

SPIN_COUNT = "20000"  # turns of libgomp's waiting loop, some 50 to 100 microseconds

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEEP_BELOW = 1 << 30  # bytes: blocks up to here come from the heap
_KEEP_FREE = (1 << 31) - 1  # bytes at the heap's top that are not given back
_GROW_BY = 64 << 20


def settle_process() -> None:
    """Spin briefly while waiting, keep freed memory, start no more threads than there are cores for us.

    What the environment says wins.

    To be called before torch is imported, which reads the environment then.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if container_limits().cores is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    _keep_freed_memory()


def may_compile() -> bool:
    """Whether this process may execute what it has written, which systemd's MemoryDenyWriteExecute forbids."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


def compute_without_compiling() -> None:
    """Have torch leave oneDNN out where that may not compile its kernels: a product in 16 bits would fail there.

    To be called once torch is imported, by who is about to compute.
    """
    if os.name == "posix" and not may_compile():
        import torch

        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]


def _keep_freed_memory() -> None:
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_FREE)
        mallopt(_M_TOP_PAD, _GROW_BY)
        mallopt(_M_ARENA_MAX, 1)  # a thread's own allocator could not hold a large block


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
