"""The enclave's end of shared memory: which parts of it are in use."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

from obfuscatune.wire.shared_memory import ALIGNMENT, SharedMemory


class Arena:
    """Lends matrices in shared memory; each comes back by itself when nothing refers to it any more.

    First fit from the start, so that few pages are ever touched, and those again and again.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._bytes = torch.frombuffer(memory.buffer, dtype=torch.uint8)
        self._lent: dict[int, int] = {}  # offset -> bytes, in the order of the offsets
        self._lock = threading.Lock()

    def lend(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor | None:
        """A (rows, cols) matrix with arbitrary elements, or None where no room is left."""
        size = rows * cols * dtype.itemsize
        room = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            offset = self._gap(room)
            if offset is None:
                return None
            self._lent = dict(sorted({**self._lent, offset: room}.items()))
        block = np.frombuffer(self._memory.buffer, np.uint8, size, offset)
        weakref.finalize(block, self._give_back, offset).atexit = False
        return torch.from_numpy(block).view(dtype).view(rows, cols)

    def offset_of(self, matrix: torch.Tensor) -> int | None:
        """Where a matrix lies in this arena; None where it does not."""
        offset = matrix.data_ptr() - self._bytes.data_ptr()
        return offset if offset in self._lent else None

    def _gap(self, room: int) -> int | None:
        start = 0
        for offset, lent in self._lent.items():
            if offset - start >= room:
                return start
            start = offset + lent
        return start if self._memory.size - start >= room else None

    def _give_back(self, offset: int) -> None:
        with self._lock:
            del self._lent[offset]
