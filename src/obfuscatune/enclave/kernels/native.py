"""The kernels of `csrc/`, each in one pass over what it reads, on torch's threads: see docs/adr/0014."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune import native
from obfuscatune.enclave.kernels.interface import SKETCHES, Projection, Rotation, RowMixing, Tolerance
from obfuscatune.enclave.kernels.reference import Reference

_REFERENCE = Reference()


class Native:
    """See `interface.Kernels`; for float32, or float64, on the CPU.

    Rows of x are contiguous and at least `table.lanes` wide; nothing is differentiated.
    """

    def __init__(self, table: native.Kernels) -> None:
        self.table = table

    def rotate(self, x: Tensor, R: Rotation, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x R + plus."""
        y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        self._rotate(x, R, None if plus is None else plus.contiguous(), y)
        return y

    def mix(self, x: Tensor, shield: Tensor, A: RowMixing, out: Tensor) -> None:
        """A [x; shield]."""
        if not out.is_contiguous():
            return _REFERENCE.mix(x, shield, A, out)
        x, shield, step = x.contiguous(), shield.contiguous(), x.shape[1] * x.itemsize
        beyond = shield.data_ptr() - x.data_ptr() - A.rows * step
        Q_a, Q_b, is_shield, _ = self._prepared(A, x.dtype)
        sources = torch.add(A.order * step, is_shield, alpha=beyond).add_(x.data_ptr())
        self._mix(sources, _rows_of(out), x.shape[1], Q_a, Q_b)
        return None

    def unmix(self, y: Tensor, A: RowMixing) -> tuple[Tensor, bool]:
        """(Aᵀ y)[:n]."""
        if not y.is_contiguous():
            return _REFERENCE.unmix(y, A)
        result = y.new_empty(A.rows + 1, y.shape[1])  # the last row takes what comes back for shield rows
        Q_a, Q_b, _, output = self._prepared(A, y.dtype)
        targets = (output * (y.shape[1] * y.itemsize)).add_(result.data_ptr())
        finite = self._mix(_rows_of(y), targets, y.shape[1], Q_a, Q_b, transposed=True)
        return result[:-1], finite

    def mix_in_place(self, W: Tensor, picked: Tensor, placed: Tensor, Q_a: Tensor, Q_b: Tensor) -> None:
        """W[placed] = (Q_a ⊗ Q_b) W[picked], for W (n, q) whose rows are contiguous.

        Args:
            picked, placed: int64 (a·b,), numbers of rows.
            Q_a, Q_b: (a, a) and (b, b) in W's dtype; a above 1, so that all is read before anything is written.
        """
        lanes = self.table.lanes
        own = W.shape[1] // lanes * lanes
        last = W[:, -lanes:].clone()  # of columns that fill no tile, one with others: done twice, it would be wrong
        for part in (W[:, :own], last) if own < W.shape[1] else (W,):
            step, start = part.stride(0) * part.itemsize, part.data_ptr()
            self._mix(picked * step + start, placed * step + start, part.shape[1], Q_a, Q_b)
        W[:, own:] = last[:, lanes - (W.shape[1] - own) :]

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Left right."""
        if not (left.is_contiguous() and right.is_contiguous() and out.is_contiguous()):
            return _REFERENCE.multiply(left, right, out)
        sizes = (*left.shape, right.shape[1])
        self.table.multiply(native.Product(left.data_ptr(), right.data_ptr(), out.data_ptr(), *sizes))
        return None

    def sketch(self, W: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, float]:
        """W R, Wᵀ L and |W|; on this thread."""
        (p, q), W, R, L = W.shape, W.contiguous(), R.contiguous(), L.contiguous()
        W_R, L_W = W.new_empty(p, SKETCHES), W.new_empty(SKETCHES, q)
        job = native.Sketches(*(x.data_ptr() for x in (W, R, L, W_R, L_W)), p, q)
        self.table.sketch(job)
        return W_R, L_W.T.contiguous(), math.sqrt(job.squares)

    def project(self, x: Tensor, v: Tensor) -> Projection:
        """In one pass, all sums in float64; v (p, 8)."""
        images = torch.empty(x.shape[0], SKETCHES, dtype=torch.float64)
        squares = torch.empty(x.shape[0], dtype=torch.float64)
        addresses = x.data_ptr(), v.data_ptr(), images.data_ptr(), squares.data_ptr()
        self.table.project(native.Projection(*addresses, *x.shape, x.stride(0), torch.get_num_threads()))
        return Projection(images, squares)

    def directions(self, words: bytes, k: int) -> Tensor:
        """On this thread."""
        c = torch.empty(SKETCHES, k, dtype=torch.float64)
        self.table.make_directions(native.Directions(words, c.data_ptr(), k))
        return c

    def excess(self, product: Tensor, R: Tensor, U: Tensor, c: Tensor, tolerance: Tolerance) -> tuple[float, bool]:
        """In one call; `self` is for numbers of the product's size."""
        unit, expected, of_masks, largest = tolerance
        job = native.Excess(
            product.data_ptr(), R.data_ptr(), U.data_ptr(), c.data_ptr(), *product.shape, product.stride(0),
            c.shape[1], torch.get_num_threads(), unit, expected, of_masks, largest * largest,
        )  # fmt: skip
        self.table.excess(job)
        return job.excess, bool(job.finite)

    def deviates(self, words: NDArray[np.uint32]) -> NDArray[np.float32]:
        """In the words' place."""
        self.table.make_deviates(native.Deviates(words.ctypes.data, words.size // 2, torch.get_num_threads()))
        return words.view(np.float32)

    def grid_normal(self, words: NDArray[np.uint64], deviation: float, grid: float) -> Tensor:
        """In the words' place."""
        sizes = words.size // 2, torch.get_num_threads()
        self.table.make_grid_normals(native.GridNormals(words.ctypes.data, *sizes, deviation / grid, grid))
        return torch.from_numpy(words.view(np.float64))

    def mask_rows(self, x: Tensor, r: Tensor, grid: float, out: Tensor) -> bool:
        """In one pass; `self` is for numbers of x's size."""
        addresses, strides = (x.data_ptr(), r.data_ptr(), out.data_ptr()), (x.stride(0), r.stride(0), out.stride(0))
        job = native.MaskRows(*addresses, *x.shape, *strides, torch.get_num_threads(), grid)
        self.table.mask_rows(job)
        return bool(job.finite)

    def unmask_rows(self, y: Tensor, product: Tensor, out: Tensor) -> None:
        """In one pass; `self` is for numbers of out's size."""
        addresses = y.data_ptr(), product.data_ptr(), out.data_ptr()
        self.table.unmask_rows(native.UnmaskRows(*addresses, *y.shape, torch.get_num_threads()))

    def mixing_of_few(self, n: int, m: int, width: int, normal: Tensor, shield_size: float) -> MixingOfFew:
        """See `MixingOfFew`; `self` is for numbers of the size of `normal`'s."""
        return MixingOfFew(self, n, m, width, normal, shield_size)

    def of_few(self, R: Rotation) -> RotationOfFew:
        """A rotation, to be done with the mixing of few rows."""
        return RotationOfFew(self, R, _whole_width(R))

    def of_few_unrotated(self, dim: int) -> RotationOfFew:
        """The same without a rotation, for rows (n, dim)."""
        return RotationOfFew(self, None, dim)

    def _rotate(self, x: Tensor, R: Rotation, plus: Tensor | None, y: Tensor) -> bool:
        """Whether x was finite."""
        prepared = R.prepared.get(self)
        if prepared is None:
            prepared = R.prepared[self] = _Prepared.of(R)
        job = native.Rotation.from_buffer_copy(prepared.job)  # other threads have theirs
        job.x, job.y, job.bias = x.data_ptr(), y.data_ptr(), None if plus is None else plus.data_ptr()
        job.rows, job.x_stride, job.threads = x.shape[0], x.stride(0), torch.get_num_threads()
        self.table.rotate(job)
        return bool(job.finite)

    def _prepared(self, A: RowMixing, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q_a and Q_b in the dtype, which rows are the shield's (0 or 1), and which row of the result each goes to."""
        found: tuple[Tensor, Tensor, Tensor, Tensor] | None = A.prepared.get(self)
        if found is None:
            Q_a, Q_b = A.Q_a.to(dtype).contiguous(), A.Q_b.to(dtype).contiguous()
            found = A.prepared[self] = Q_a, Q_b, (A.order >= A.rows).long(), A.order.clamp(max=A.rows)
        return found

    def _mix(
        self, sources: Tensor, targets: Tensor, columns: int, Q_a: Tensor, Q_b: Tensor, *, transposed: bool = False
    ) -> bool:
        """Rows `targets` = (Q_a ⊗ Q_b) times rows `sources`, by their addresses; whether these were finite."""
        Q_a, Q_b = Q_a.contiguous(), Q_b.contiguous()
        job = native.Mixing(
            sources.data_ptr(), targets.data_ptr(), columns, Q_a.shape[0], Q_b.shape[0], Q_a.data_ptr(),
            Q_b.data_ptr(), transposed, torch.get_num_threads(),
        )  # fmt: skip
        self.table.mix(job)
        return bool(job.finite)


class MixingOfFew:
    """The secrets of one request of n rows of `width` numbers, and what the kernels need to make its answer."""

    def __init__(self, kernels: Native, n: int, m: int, width: int, normal: Tensor, shield_size: float) -> None:
        """
        Args:
            kernels: for numbers of the rows' size.
            n, m, width: rows of the request, rows that are sent, numbers in a row; n <= m <= `native.MOST_FEW`.
            normal: (m·m + (m - n)·width,), of the rows' dtype: for A, then for shield rows of that size.
            shield_size: root mean square of the numbers of shield rows.
        """
        self._table, self._normal = kernels.table, normal
        self._memory = torch.empty(m * (2 * m + width), dtype=normal.dtype)
        self.job = native.FewRequest(
            normal=normal.data_ptr(), mixing=self._memory.data_ptr(), n=n, m=m, p=width, shield_size=shield_size
        )

    @property
    def A(self) -> Tensor:  # noqa: N802 - as in the formulas
        """(m, m), orthogonal, once rows were sent."""
        m = self.job.m
        return self._memory[: m * m].view(m, m)

    @property
    def stack(self) -> Tensor:
        """[D x R; N] (m, width), once rows were sent."""
        m = self.job.m
        return self._memory[2 * m * m :].view(m, self.job.p)

    def image(self, v: Tensor) -> Tensor:
        """A [D x R; N] v (m, 8) for v (p, 8), float64 both, of the rows that were sent, without reading them back."""
        m, p, memory, itemsize = self.job.m, self.job.p, self.job.mixing, self._memory.itemsize
        images, squares = torch.empty(m, SKETCHES, dtype=torch.float64), torch.empty(m, dtype=torch.float64)
        self._table.project(
            native.Projection(
                memory + 2 * m * m * itemsize, v.data_ptr(), images.data_ptr(), squares.data_ptr(), m, p, p,
                torch.get_num_threads(), memory,
            )
        )  # fmt: skip
        return images


class RotationOfFew:
    """A rotation of few rows, or none (R = 1), and their mixing, one way or back."""

    def __init__(self, kernels: Native, R: Rotation | None, dim: int) -> None:
        self._table, self.dim = kernels.table, dim
        self._prepared = None if R is None else _Prepared.of(R)
        self._rotation = None if self._prepared is None else ctypes.pointer(self._prepared.job)

    def send(self, x: Tensor, mixing: MixingOfFew, out: Tensor) -> bool:
        """out (m, p) = A [D x R; N] for x (n, p), rows contiguous; whether x is finite: else nothing is written."""
        job = mixing.job
        job.x, job.x_stride, job.out, job.turn = x.data_ptr(), x.stride(0), out.data_ptr(), self._rotation
        self._table.send_few(job)
        return bool(job.finite)

    def receive(self, product: Tensor, mixing: MixingOfFew, bias: Tensor | None) -> Tensor | None:
        """D⁻¹ (Aᵀ Y)[:n] R + bias (n, dim) for `product` Y (m, dim), contiguous; None where Y is not finite.

        The sum of squares without D⁻¹ and the bias is left in `mixing.job.squares`.
        """
        job = mixing.job
        answer = torch.empty(job.n, self.dim, dtype=product.dtype)
        job.y, job.answer, job.back, job.q = product.data_ptr(), answer.data_ptr(), self._rotation, self.dim
        job.bias = None if bias is None else bias.data_ptr()
        self._table.receive_few(job)
        return answer if job.finite else None


@dataclass(frozen=True)
class _Prepared:
    """A rotation as the kernels take it, and the tensors that it has the addresses of."""

    job: native.Rotation
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, R: Rotation) -> _Prepared:
        width = _whole_width(R)
        first, *between, last = (whole(permutation, width).contiguous() for permutation in R.permutations)
        tensors = [first, torch.argsort(first), *between, last]
        job = native.Rotation(width=width)
        job.first, job.first_inverse, job.last = (x.data_ptr() for x in (*tensors[:2], last))
        job.between = between[0].data_ptr() if between else None
        for number, grid in enumerate(R.grids):
            Q_a, Q_b = grid.Q_a.contiguous(), grid.Q_b.contiguous()
            sizes = grid.start, Q_a.shape[0], Q_b.shape[0]
            job.grids[number] = native.Grid(*sizes, Q_a.data_ptr(), Q_b.data_ptr())
            tensors += [Q_a, Q_b]
        return cls(job, tuple(tensors))


def _whole_width(R: Rotation) -> int:
    return max(permutation.numel() for permutation in R.permutations)


def _rows_of(x: Tensor) -> Tensor:
    """Addresses of the rows of x, int64 (m,)."""
    step = x.shape[1] * x.itemsize
    return torch.arange(x.data_ptr(), x.data_ptr() + x.shape[0] * step, step)


def whole(permutation: Tensor, dim: int) -> Tensor:
    """A permutation of `dim` places, or of pairs of them, as one of places."""
    if 2 * permutation.numel() == dim:
        return torch.stack([2 * permutation, 2 * permutation + 1], dim=1).flatten()
    return permutation
