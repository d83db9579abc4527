"""Memory for a matrix that stays: in huge pages, where the system has them.

Each product reads all of W*. In pages of 4 KiB that takes some percent longer, and to touch them for the first time,
when the matrix comes, takes longer than to receive it.
"""

import contextlib
import mmap
import sys

import numpy as np
import torch

from obfuscatune.wire.tensors import bytes_of

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
