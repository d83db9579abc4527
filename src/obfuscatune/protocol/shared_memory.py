"""Memory that enclave and worker on one host both map, so that rows and products need not be copied through a socket.

The enclave makes it and hands its descriptor over the unix socket; each side knows only offsets in it. It is sealed at
its size: whoever could cut it short would kill the other at the next access. Its content is the other side's to change
at any time, so nothing that lies in it may be relied upon after a check.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
from typing import NamedTuple, Self

import torch

from obfuscatune.errors import LimitExceeded, MalformedMessage
from obfuscatune.protocol.limits import MAX_SHARED_BYTES
from obfuscatune.protocol.tensors import array_in, matrix_of

ALIGNMENT = 64
"""Of every offset, in bytes: a cache line, and the widest vector."""
MOST_MADE = 64
"""Matrices that are kept to be used again; they hold no memory but their own few hundred bytes."""
AVAILABLE = sys.platform == "linux"
"""Whether this system has sealed memory files."""

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4)


class SharedMemory:
    """One mapping. It ends when the last matrix in it is gone."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.buffer = mmap.mmap(descriptor, size)
        self._made: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}
        """Matrices by their place: requests come to the same places over and over."""

    @classmethod
    def create(cls, size: int) -> tuple[Self, int]:
        """New memory of `size` bytes, and the descriptor to hand over and to close then.

        Raises:
            OSError: the system has none to give.
        """
        descriptor = os.memfd_create("obfuscatune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            return cls(descriptor, size), descriptor
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, descriptor: int | None, size: int) -> Self:
        """The memory behind a received descriptor, which is closed here.

        Raises:
            MalformedMessage: no descriptor came, or none of sealed memory of just that size.
            LimitExceeded: it is larger than MAX_SHARED_BYTES.
        """
        if descriptor is None:
            raise MalformedMessage("memory to be shared was announced, and no descriptor came with it")
        try:
            if size > MAX_SHARED_BYTES:
                raise LimitExceeded(f"{size} bytes of shared memory: at most {MAX_SHARED_BYTES}")
            seals = 0
            with contextlib.suppress(OSError):  # not a memory file at all
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or size == 0 or os.fstat(descriptor).st_size != size:
                raise MalformedMessage("what was shared is not sealed memory of the announced size")
            return cls(descriptor, size)
        except OSError as error:
            raise MalformedMessage(f"what was shared cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def place(self, offset: int) -> Place:
        """The place at `offset`, for a matrix whose shape is not known yet.

        Raises:
            MalformedMessage: not a byte lies behind it, or `offset` is no multiple of `ALIGNMENT`.
        """
        self._check(offset, 1)
        return Place(self, offset)

    def matrix(self, offset: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """The (rows, cols) matrix at `offset`, in place; it keeps the mapping alive.

        Raises:
            MalformedMessage: it does not lie within, or not on a multiple of `ALIGNMENT`.
        """
        place = offset, rows, cols, dtype
        matrix = self._made.get(place)
        if matrix is None:
            self._check(offset, rows * cols * dtype.itemsize)
            matrix = matrix_of(array_in(self.buffer, offset, rows, cols, dtype), dtype)
            if len(self._made) >= MOST_MADE:
                self._made.clear()
            self._made[place] = matrix
        return matrix

    def _check(self, offset: int, size: int) -> None:
        if offset % ALIGNMENT or offset + size > self.size:
            raise MalformedMessage(f"{size} bytes at {offset} do not lie in {self.size} bytes of shared memory")


class Place(NamedTuple):
    """Where in shared memory a matrix may be laid, within it and aligned."""

    memory: SharedMemory
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes from there to the end of the memory."""
        return self.memory.size - self.offset

    def matrix(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """See `SharedMemory.matrix`."""
        return self.memory.matrix(self.offset, rows, cols, dtype)
