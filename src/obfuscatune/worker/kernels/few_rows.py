"""X W for few rows X, by the compiled kernel."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from obfuscatune.jit import team
from obfuscatune.jit.emit import Shape
from obfuscatune.jit.engine import Engine, host_shape
from obfuscatune.worker.kernels.source import Job, build

PIECE_BYTES = 1 << 12
"""Of a row of W, at most: its sums stay in the second cache."""
_ALIGNMENT = 64
_lock = threading.Lock()


def strip_columns(itemsize: int) -> int:
    """Least columns of a matrix of numbers of 4 or 8 bytes. Compiles the kernel for them."""
    return _kernel(itemsize)[0].lanes


def multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix.

    Args:
        rows: (m, p), contiguous, float32 or float64.
        matrix: (p, q), contiguous, of the same dtype; q at least `strip_columns`.
        out: (m, q), contiguous, of the same dtype.
    """
    (m, p), q = rows.shape, matrix.shape[1]
    shape, kernel, _ = _kernel(rows.itemsize)
    strips, threads = -(-q // shape.lanes), torch.get_num_threads()
    each = -(-strips // threads)
    piece = -(-each // -(-each * shape.row_bytes // PIECE_BYTES))  # as many pieces for one thread as for the others
    scratch_bytes = m * piece * shape.row_bytes
    scratch = torch.empty(threads * scratch_bytes + _ALIGNMENT, dtype=torch.uint8)
    job = (ctypes.c_int64 * Job.LENGTH)()
    job[Job.STRIPS], job[Job.PIECE] = strips, piece
    job[Job.ROWS], job[Job.INNER], job[Job.COLUMNS] = m, p, q
    job[Job.X], job[Job.W], job[Job.OUT] = rows.data_ptr(), matrix.data_ptr(), out.data_ptr()
    job[Job.SCRATCH] = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    job[Job.SCRATCH_BYTES] = scratch_bytes
    team.run(kernel, ctypes.addressof(job), min(threads, strips))


def _kernel(itemsize: int) -> tuple[Shape, int, Engine]:
    """Its shape and its address; the code lives as long as the engine."""
    with _lock:
        return _compiled(itemsize)


@functools.cache
def _compiled(itemsize: int) -> tuple[Shape, int, Engine]:
    host = host_shape(itemsize)
    wide = host.width * itemsize == 64  # 32 registers: 24 sums, 4 vectors of W, a factor
    shape = Shape(itemsize, host.width, 4 if wide else 2, 6)
    engine = Engine(functools.partial(build, shape))
    return shape, engine.address("few_rows"), engine
