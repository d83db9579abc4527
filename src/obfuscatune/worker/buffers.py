"""Memory for matrices that stay, and memory that a connection uses over and over.

Each product reads all of W*. Matrices lie in huge pages, where the system has them: in pages of 4 KiB a product takes
some percent longer, and to touch them for the first time takes longer than to receive the matrix. For the same reason a
connection keeps its buffers: a fresh one of 33 MB costs 8,000 page faults.
"""

import contextlib
import mmap
import sys
import threading
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from obfuscatune.protocol.limits import KIB, MAX_IN_FLIGHT, MIB
from obfuscatune.protocol.tensors import bytes_of

HUGE_PAGE_BYTES = 2 << 20
"""On x86-64 and, mostly, on ARM; where it is another, nothing is lost."""


def matrix_memory(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """A (rows, cols) matrix with arbitrary elements, at the beginning of a huge page if it fills one.

    Raises:
        MemoryError, RuntimeError: the system has not so much.
    """
    size = rows * cols * dtype.itemsize
    if size < HUGE_PAGE_BYTES or not sys.platform.startswith("linux"):
        return torch.empty(rows, cols, dtype=dtype)
    pages = -(-size // HUGE_PAGE_BYTES) + 1
    try:
        memory = mmap.mmap(-1, pages * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(error.strerror) from error
    with contextlib.suppress(OSError):  # a system that has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE_BYTES
    return everything[start : start + size].view(dtype).view(rows, cols)


def copy_of(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix in memory of its own; by one thread, for it is the system that takes its time over new pages.

    The enclave transforms the next one meanwhile, and needs the other cores.
    """
    rows, cols = matrix.shape
    own = matrix_memory(rows, cols, matrix.dtype)
    np.copyto(np.frombuffer(bytes_of(own), np.uint8), np.frombuffer(bytes_of(matrix), np.uint8))
    return own


KEPT_BYTES = 256 * MIB
"""Most memory that a connection keeps while idle; above it, a buffer is freed when it is given back."""
SMALL_BYTES = 64 * KIB
"""A smaller buffer is kept as the matrix that it was, a larger one as memory for a matrix of any shape."""
MOST_KINDS = 16
"""Kinds of small buffers that a connection keeps: the requests for one token of any model have a dozen."""
Kind = tuple[int, int, torch.dtype]
"""Rows, columns and dtype."""


class MatrixBuffer(NamedTuple):
    """A matrix and the bytes of its memory. Both are kept together: of few rows, to make them takes longer than to
    multiply."""

    kind: Kind
    matrix: torch.Tensor
    """(rows, cols), contiguous, on the CPU."""
    view: memoryview
    """What is received into it, or sent from it; empty where it lies in shared memory."""


class Buffers:
    """Buffers of one connection, lent and given back. Safe from any thread."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: memory that a CUDA device reads and writes itself, at twice the speed or more."""
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._small: dict[Kind, deque[MatrixBuffer]] = {}
        """Of each kind as many as requests can be in flight. No lock: each step is one operation on a dict or deque."""
        self._lock = threading.Lock()

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> MatrixBuffer:
        """A matrix with arbitrary elements."""
        kind = rows, cols, dtype
        try:
            return self._small[kind].pop()
        except LookupError:  # none of that kind is kept, or all are lent
            return self._new(kind)

    def give_back(self, buffer: MatrixBuffer) -> None:
        """What `allocate` lent; nobody may read or write it from here on."""
        kept = self._small.get(buffer.kind)
        if kept is not None:
            kept.append(buffer)
        elif len(buffer.view) >= SMALL_BYTES:
            self._keep(torch.empty(0, dtype=torch.uint8).set_(buffer.matrix.untyped_storage()))

    def _new(self, kind: Kind) -> MatrixBuffer:
        rows, cols, dtype = kind
        size = rows * cols * dtype.itemsize
        if size >= SMALL_BYTES:
            matrix = self._take(size)[:size].view(dtype).view(rows, cols)
        else:
            matrix = torch.empty(rows, cols, dtype=dtype, pin_memory=self._pinned)
            if len(self._small) >= MOST_KINDS and kind not in self._small:
                self._small.clear()  # of shapes that may be asked for no more
            self._small.setdefault(kind, deque(maxlen=MAX_IN_FLIGHT))
        return MatrixBuffer(kind, matrix, bytes_of(matrix))

    def _keep(self, memory: torch.Tensor) -> None:
        with self._lock:
            if sum(buffer.nbytes for buffer in self._free) + memory.nbytes <= KEPT_BYTES:
                self._free.append(memory)

    def _take(self, size: int) -> torch.Tensor:
        """The smallest free memory that is large enough, or else new."""
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
            self._free[:] = [buffer for buffer in self._free if buffer.nbytes > size]  # outgrown
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
