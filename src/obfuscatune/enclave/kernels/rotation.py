"""x R for structured R in one pass over x: see `source`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.kernels import few, job
from obfuscatune.enclave.kernels.compiled import Compiled
from obfuscatune.enclave.kernels.mixing import MixingOfFew
from obfuscatune.enclave.kernels.source import Job
from obfuscatune.jit import team


@dataclass(frozen=True)
class Grid:
    """x (Q_a ⊗ Q_b) on columns `start` and after."""

    start: int
    Q_a: Tensor
    Q_b: Tensor


class Rotation:
    """x Π₁ (Q_a ⊗ Q_b) Π₂ or, on two grids, x Π₁ (Q_a ⊗ Q_b) Π₂ (Q_c ⊗ Q_d) Π₃, prepared for one dtype."""

    def __init__(self, permutations: Sequence[Tensor], grids: Sequence[Grid], code: Compiled) -> None:
        """
        Args:
            permutations: int64 (p,) each: column j after Π is column `permutation[j]` before. One more than grids.
            grids: one or two.
            code: the kernels for the dtype.
        """
        first, *between, last = permutations
        shape, dim = code.shape, first.numel()
        self.dim, self._code = dim, code
        area = -(-dim // shape.lanes) * shape.lanes
        tables = {
            Job.FROM: torch.argsort(first) * shape.row_bytes,
            Job.TO: last * shape.row_bytes,
            Job.ROWS: job.multiples(dim, shape.row_bytes),
        }
        if between:
            tables[Job.BETWEEN] = between[0] * shape.row_bytes
        sizes = {Job.WIDTH: dim, Job.AREA: area}
        keys = [
            (Job.START, Job.A, Job.Q_A, Job.B, Job.Q_B),
            (Job.SECOND_START, Job.C, Job.Q_C, Job.D, Job.Q_D),
        ]
        for grid, (start, a, q_a, b, q_b) in zip(grids, keys, strict=False):
            sizes |= {start: grid.start * shape.row_bytes, a: grid.Q_a.shape[0], b: grid.Q_b.shape[0]}
            tables |= {q_a: job.packed(grid.Q_a.T, code), q_b: job.packed(grid.Q_b.T, code)}
        self._tables = tables  # they are read by address
        self._fixed = {**sizes, **{key: table.data_ptr() for key, table in tables.items()}}
        side = max(max(grid.Q_a.shape[0], grid.Q_b.shape[0]) for grid in grids)
        rows = 1 + area * len(grids) + side
        self._scratch_bytes = rows * shape.row_bytes + 8 * shape.lanes + 2 * area * shape.itemsize

    def __call__(self, x: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> tuple[Tensor, float]:
        """For x (n, p), n >= 1, whose rows are contiguous: the result (n, p), and the sum of the squares of x.

        `out`, contiguous, takes the result where it is given; it may be x, whose panels are read before they are
        written. `plus` (p,), contiguous, of x's dtype, is added to every row of the result.
        """
        y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        n, itemsize = x.shape[0], x.itemsize
        fields = {
            **self._fixed,
            Job.PANELS: -(-n // self._code.shape.lanes),
            Job.TOGETHER: 1,
            Job.COUNT: n,
            Job.SOURCE: x.data_ptr(),
            Job.SOURCE_STEP: x.stride(0) * itemsize,
            Job.TARGET: y.data_ptr(),
            Job.TARGET_STEP: self.dim * itemsize,
            Job.PLUS: 0 if plus is None else plus.data_ptr(),
        }
        return y, job.run(self._code.rotate, fields, x.numel(), self._scratch_bytes)


class RotationOfFew:
    """The same for few rows, which would leave most of a panel empty: one after another, on this thread."""

    def __init__(self, permutations: Sequence[Tensor], grids: Sequence[Grid], code: Compiled) -> None:
        """As `Rotation`; every grid at least a vector register wide."""
        first, *between, last = permutations
        itemsize = code.shape.itemsize
        self.dim, self._code, self._itemsize = first.numel(), code, itemsize
        tables = {few.Job.FROM: first * itemsize, few.Job.TO: last * itemsize}
        if between:
            tables[few.Job.BETWEEN] = between[0] * itemsize
        sizes = {few.Job.WIDTH: self.dim}
        for grid, (start, a, q_a, b, q_b) in zip(grids, (few.FIRST_GRID, few.SECOND_GRID), strict=False):
            sizes |= {start: grid.start * itemsize, a: grid.Q_a.shape[0], b: grid.Q_b.shape[0]}
            tables |= {q_a: grid.Q_a.T.contiguous(), q_b: grid.Q_b.contiguous()}
        self._tables = tables  # they are read by address
        self._job = (ctypes.c_int64 * few.Job.LENGTH)()
        for key, value in {**sizes, **{key: table.data_ptr() for key, table in tables.items()}}.items():
            self._job[key] = value

    def __call__(self, x: Tensor, out: Tensor | None = None, plus: Tensor | None = None) -> tuple[Tensor, float]:
        """As `Rotation`."""
        y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        squares = self._run(self._code.turn, x, y)
        return (y if plus is None else y.add_(plus)), squares

    def send(self, x: Tensor, mixing: MixingOfFew, out: Tensor) -> float:
        """out (m, p) = A [x R; N] for x (n, p), rows contiguous; the sum of the squares of x.

        N are `mixing.stack`'s last rows, above which x R is laid.
        """
        return self._run(self._code.send, x, mixing.stack, mixing, out)

    def receive(self, crossed: Tensor, mixing: MixingOfFew, out: Tensor) -> float:
        """out (n, p) = (Aᵀ Y)[:n] R for `crossed` Y (m, p), contiguous; the sum of the squares, for which Y was read.

        `mixing.A_transposed` is read, and nothing else of it.
        """
        unmixed = torch.empty_like(out)
        return self._run(self._code.receive, unmixed, out, mixing, crossed)

    def _run(
        self, kernel: int, x: Tensor, y: Tensor, mixing: MixingOfFew | None = None, crossed: Tensor | None = None
    ) -> float:
        work = (ctypes.c_int64 * few.Job.LENGTH).from_buffer_copy(self._job)  # other threads have theirs
        squares = ctypes.c_double(0.0)
        work[few.Job.X], work[few.Job.Y] = x.data_ptr(), y.data_ptr()
        work[few.Job.ROWS], work[few.Job.X_STEP] = x.shape[0], x.stride(0) * self._itemsize
        work[few.Job.SCRATCH] = job.scratch(3 * self.dim * self._itemsize)
        work[few.Job.SQUARES] = ctypes.addressof(squares)
        if mixing is not None and crossed is not None:
            sends = kernel == self._code.send
            factor = mixing.A if sends else mixing.A_transposed
            work[few.Job.STACK] = (y if sends else x).data_ptr()
            work[few.Job.M], work[few.Job.MIXING] = factor.shape[0], factor.data_ptr()
            work[few.Job.CROSSED] = crossed.data_ptr()
        team.run(kernel, ctypes.addressof(work), 1)
        return squares.value
