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
from obfuscatune.worker.kernels.source import BLOCK, Job, build

PIECE_BYTES = 1 << 11
"""Of one row of sums: with 16 rows they fill two thirds of a core's first cache."""
_ALIGNMENT = 64
_lock = threading.Lock()


def lanes(itemsize: int) -> int:
    """Numbers of 4 or 8 bytes in a vector register. Compiles the kernel for them."""
    return _kernel(itemsize)[0].width


def multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix.

    Args:
        rows: (m, p), float32 or float64.
        matrix: (p, q), contiguous, of the same dtype; q at least a vector register's.
        out: (m, q), contiguous, of the same dtype.
    """
    (m, p), q = rows.shape, matrix.shape[1]
    shape, kernel, _ = _kernel(rows.itemsize)
    padded = -(-m // BLOCK) * BLOCK
    X = rows.new_zeros(p, padded)
    X[:, :m] = rows.T
    vectors = -(-q // shape.width)
    threads = torch.get_num_threads()
    piece = max(min(PIECE_BYTES // (shape.width * shape.itemsize), -(-vectors // (2 * threads))), 1)
    pieces = -(-vectors // piece)
    scratch_bytes = -(-padded * piece * shape.width * shape.itemsize // _ALIGNMENT) * _ALIGNMENT
    scratch = torch.empty(threads * scratch_bytes + _ALIGNMENT, dtype=torch.uint8)
    job = (ctypes.c_int64 * Job.LENGTH)()
    fields = {
        Job.PIECES: pieces,
        Job.PIECE: piece,
        Job.ROWS: padded,
        Job.REAL_ROWS: m,
        Job.INNER: p,
        Job.COLUMNS: q,
        Job.X: X.data_ptr(),
        Job.W: matrix.data_ptr(),
        Job.OUT: out.data_ptr(),
        Job.SCRATCH: -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT,
        Job.SCRATCH_BYTES: scratch_bytes,
    }
    for key, value in fields.items():
        job[key] = value
    team.run(kernel, ctypes.addressof(job), min(threads, pieces))


def _kernel(itemsize: int) -> tuple[Shape, int, Engine]:
    """Its shape and its address; the code lives as long as the engine."""
    with _lock:
        return _compiled(itemsize)


@functools.cache
def _compiled(itemsize: int) -> tuple[Shape, int, Engine]:
    shape = host_shape(itemsize)
    engine = Engine(functools.partial(build, shape))
    return shape, engine.address("few_rows"), engine
