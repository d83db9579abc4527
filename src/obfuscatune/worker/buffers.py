"""Memory that a connection uses over and over.

A fresh buffer of 33 MB costs 8,000 page faults, which take longer than to receive 33 MB into one that has been used
before.
"""

import threading

import torch

from obfuscatune.wire.limits import KIB, MIB

KEPT_BYTES = 256 * MIB
"""Most memory that a connection keeps while idle; above it, a buffer is freed when it is given back."""
KEPT_FROM_BYTES = 64 * KIB
"""A smaller buffer is not worth being kept: the allocator has such at hand."""


class Buffers:
    """Buffers of one connection, lent and given back. Safe from any thread."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: memory that a CUDA device reads and writes itself, at twice the speed or more."""
        self._pinned = pinned
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def lend(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous (rows, cols) matrix on the CPU with arbitrary elements."""
        size = rows * cols * dtype.itemsize
        if size < KEPT_FROM_BYTES and not self._pinned:
            return torch.empty(rows, cols, dtype=dtype)
        return self._take(size)[:size].view(dtype).view(rows, cols)

    def give_back(self, matrix: torch.Tensor) -> None:
        """What `lend` lent; nobody may read or write it from here on."""
        if matrix.nbytes < KEPT_FROM_BYTES and not self._pinned:
            return
        memory = torch.empty(0, dtype=torch.uint8).set_(matrix.untyped_storage())
        with self._lock:
            if sum(buffer.nbytes for buffer in self._free) + memory.nbytes <= KEPT_BYTES:
                self._free.append(memory)

    def _take(self, size: int) -> torch.Tensor:
        """The smallest free buffer that is large enough, or else a new one."""
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
            self._free[:] = [buffer for buffer in self._free if buffer.nbytes > size]  # outgrown
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
