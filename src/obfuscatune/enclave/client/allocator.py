"""The enclave's end of memory that a worker also reads and writes: which parts of it are in use."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import torch
from numpy.typing import NDArray

from obfuscatune.backend import HostMemory
from obfuscatune.protocol.shared_memory import ALIGNMENT, SharedMemory
from obfuscatune.protocol.tensors import array_in, matrix_of


class Allocator:
    """Allocates matrices in shared memory; each is freed by itself when nothing refers to it any more.

    First fit from the start. A block that was freed is used again for the same size, so that few pages are ever
    touched, and those again and again.
    """

    def __init__(self, memory: SharedMemory | HostMemory) -> None:
        self._memory = memory
        self._start = torch.frombuffer(memory.buffer, dtype=torch.uint8).data_ptr()
        self._blocks: dict[int, int] = {}  # offset -> bytes, in the order of the offsets; allocated or free
        self._unused: dict[int, list[int]] = {}  # bytes -> offsets of blocks that were freed
        self._allocated: dict[int, weakref.ref[NDArray[Any]]] = {}
        self._freed: deque[int] = deque()
        """Offsets of blocks that nothing refers to any more; they come from wherever the last reference is dropped."""
        self._lock = threading.Lock()

    def begin_in_child(self) -> None:
        """In a forked child, where nothing is allocated any more: what was is only freed."""
        self._lock = threading.Lock()  # the parent's may have been held by a thread that is not here

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor | None:
        """A (rows, cols) matrix with arbitrary elements, or None where no room is left."""
        size = rows * cols * dtype.itemsize
        room = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            while self._freed:
                self._free(self._freed.popleft())
            unused = self._unused.get(room)
            offset = unused.pop() if unused else self._new(room)
            if offset is None:
                return None
            block = array_in(self._memory.buffer, offset, rows, cols, dtype)
            place, freed = offset, self._freed.append
            self._allocated[place] = weakref.ref(block, lambda _: freed(place))
        return matrix_of(block, dtype)

    def offset_of(self, matrix: torch.Tensor) -> int | None:
        """Where a matrix lies in this allocator; None where it does not."""
        offset = matrix.data_ptr() - self._start
        return offset if offset in self._allocated else None

    def _new(self, room: int) -> int | None:
        """The offset of a new block; where there is no gap, free blocks are made one."""
        offset = self._gap(room)
        if offset is None and len(self._blocks) > len(self._allocated):
            self._unused.clear()
            self._blocks = {offset: size for offset, size in self._blocks.items() if offset in self._allocated}
            offset = self._gap(room)
        if offset is not None:
            self._blocks = dict(sorted({**self._blocks, offset: room}.items()))
        return offset

    def _gap(self, room: int) -> int | None:
        start = 0
        for offset, size in self._blocks.items():
            if offset - start >= room:
                return start
            start = offset + size
        return start if self._memory.size - start >= room else None

    def _free(self, offset: int) -> None:
        del self._allocated[offset]
        self._unused.setdefault(self._blocks[offset], []).append(offset)
