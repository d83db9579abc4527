"""X W for few rows X, by the compiled kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obfuscatune.jit import team
from obfuscatune.jit.emit import Shape
from obfuscatune.jit.engine import Engine, compiled_once, host_shape
from obfuscatune.worker.kernels.source import Job, build

PIECE_BYTES = 1 << 12
"""Of a row of W, at most: its sums stay in the second cache."""
BYTES_PER_THREAD = 1 << 20
"""Of W: reading fewer takes no longer than waking a thread."""
_ALIGNMENT = 64


def strip_columns(itemsize: int) -> int:
    """Least columns of a matrix of numbers of 4 or 8 bytes. Compiles the kernel for them."""
    return compiled(itemsize).shape.lanes


@dataclass(frozen=True, eq=False)
class Kernels:
    """Address of the kernel, `void(int64_t *job)`; the code lives as long as the engine."""

    shape: Shape
    few_rows: int
    engine: Engine = field(repr=False)


@dataclass(frozen=True)
class Cut:
    """How a matrix of q columns is shared among threads."""

    strips: int
    piece: int
    threads: int

    @classmethod
    def of(cls, columns: int, shape: Shape, threads: int) -> Cut:
        """As many pieces for one thread as for the others."""
        strips = -(-columns // shape.lanes)
        each = -(-strips // threads)
        return cls(strips, -(-each // -(-each * shape.row_bytes // PIECE_BYTES)), min(threads, strips))

    def scratch_bytes(self, rows: int, shape: Shape) -> int:
        """Of one thread."""
        return rows * self.piece * shape.row_bytes


def multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix.

    Args:
        rows: (m, p), contiguous, float32 or float64.
        matrix: (p, q), contiguous, of the same dtype; q at least `strip_columns`.
        out: (m, q), contiguous, of the same dtype.
    """
    (m, p), q = rows.shape, matrix.shape[1]
    kernels = compiled(rows.itemsize)
    cut = Cut.of(q, kernels.shape, torch.get_num_threads())
    job, _scratch = prepared(cut.scratch_bytes(m, kernels.shape), cut.threads)
    job[Job.STRIPS], job[Job.PIECE] = cut.strips, cut.piece
    job[Job.ROWS], job[Job.INNER], job[Job.COLUMNS] = m, p, q
    job[Job.X], job[Job.W], job[Job.OUT] = rows.data_ptr(), matrix.data_ptr(), out.data_ptr()
    team.run(kernels.few_rows, ctypes.addressof(job), cut.threads)


def prepared(scratch_bytes: int, threads: int) -> tuple[ctypes.Array[ctypes.c_int64], Tensor]:
    """A job with nothing but its scratch memory, so much for each thread; and that memory, to be kept as long."""
    each = -(-scratch_bytes // _ALIGNMENT) * _ALIGNMENT
    scratch = torch.empty(threads * each + _ALIGNMENT, dtype=torch.uint8)
    job = (ctypes.c_int64 * Job.LENGTH)()
    job[Job.SCRATCH] = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    job[Job.SCRATCH_BYTES] = each
    return job, scratch


@compiled_once
def compiled(itemsize: int) -> Kernels:
    """The kernel for numbers of 4 or 8 bytes; compiled at the first call."""
    host = host_shape(itemsize)
    wide = host.width * itemsize == 64  # 32 registers: 24 sums, 4 vectors of W, a factor
    shape = Shape(itemsize, host.width, 4 if wide else 2, 6)
    engine = Engine(lambda triple: build(shape, triple))
    return Kernels(shape, engine.address("few_rows"), engine)
