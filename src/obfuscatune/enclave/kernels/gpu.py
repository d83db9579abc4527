"""The kernels for an enclave's own part on a GPU, in Triton: rotation in one pass, mixing in another.

    rotate   y = x Π₁ (Q_a ⊗ Q_b) Π₂ + plus     a program for a few whole rows
    mix      X* = (Q_a ⊗ Q_b) P [x; N]          a program for a few whole columns
    unmix    x = (Pᵀ (Q_aᵀ ⊗ Q_bᵀ) Y*)[:n]      likewise

By torch's operations each of them is four or five passes over memory: permute, multiply, multiply, permute, add. No one
pass can do both: every element of X* depends on all rows and all columns. docs/adr/0026 says what else there is no
kernel for, and why. Nothing is rounded but as float32 and float64 are: no TF32.

What does not fit is computed by `reference`: one factor alone, two grids, rows or columns beyond a program's registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from obfuscatune.enclave.kernels.gpu_programs import mix_columns, rotate_rows, unmix_columns
from obfuscatune.enclave.kernels.interface import Rotation, RowMixing
from obfuscatune.enclave.kernels.native import whole
from obfuscatune.enclave.kernels.reference import Reference

LEAST_SIDE = 16
"""Of a tile: what a product of tiles takes at least."""
TILE = {torch.float32: 4096, torch.float64: 2048}
"""Elements of a tile that a program is given, where a row or column does not need more."""
LARGEST_ROW = {torch.float32: 1 << 13, torch.float64: 1 << 12}
"""Elements of a padded row beyond which a program takes minutes to compile: its products are unrolled."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""Of each launch. A fused multiply-add rounds once where two operations round twice."""


class _Factors(NamedTuple):
    """A structured matrix as a kernel takes it, on the device."""

    picked: Tensor
    """int32: which element lies at each place of the grid."""
    placed: Tensor
    """int32: where each place of the grid goes."""
    Q_a: Tensor
    Q_b: Tensor


class Gpu(Reference):
    """See `interface.Kernels`; for float32 and float64 on a CUDA device, nothing of it differentiated."""

    def rotate(self, x: Tensor, R: Rotation, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x R + plus."""
        a, b = (Q.shape[0] for Q in (R.grids[0].Q_a, R.grids[0].Q_b))
        A, B = _side(a), _side(b)
        if len(R.grids) > 1 or a == 1 or LARGEST_ROW[x.dtype] < A * B or x.stride(1) != 1:
            return super().rotate(x, R, plus=plus, out=out)
        factors = R.prepared.get(Gpu)
        if factors is None:
            first, last = (whole(permutation, a * b) for permutation in R.permutations)
            grid = R.grids[0]
            placed = torch.argsort(last).int()
            factors = R.prepared[Gpu] = _Factors(first.int(), placed, grid.Q_a.contiguous(), grid.Q_b.contiguous())
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # a row is read before any of it is written, but
        together = max(1, TILE[x.dtype] // (A * B))  # `out` may be other rows of x
        bias = y if plus is None else plus.contiguous()
        with _on(x):
            rotate_rows[(triton.cdiv(x.shape[0], together),)](
                x, y, *factors, bias, x.shape[0], a * b, x.stride(0), a, b,
                A=A, B=B, R=together, HAS_BIAS=plus is not None, **OPTIONS,
            )  # fmt: skip
        return y if out is None else out.copy_(y)

    def mix(self, x: Tensor, shield: Tensor, A: RowMixing, out: Tensor) -> None:
        """A [x; shield]."""
        sides = self._sides(A, x, out)
        if sides is None:
            super().mix(x, shield, A, out)
            return
        shield, order = shield.to(x).contiguous(), A.order.int().to(x.device)
        with _on(x):
            mix_columns[(triton.cdiv(x.shape[1], sides.columns),)](
                x, shield, order, A.Q_a.to(x).contiguous(), A.Q_b.to(x).contiguous(), out,
                A.rows, x.shape[1], x.stride(0), out.stride(0), sides.a, sides.b,
                A=sides.A, B=sides.B, C=sides.columns, **OPTIONS,
            )  # fmt: skip

    def unmix(self, y: Tensor, A: RowMixing) -> tuple[Tensor, bool]:
        """(Aᵀ y)[:n]."""
        sides = self._sides(A, y, y)
        if sides is None:
            return super().unmix(y, A)
        x = torch.empty(A.rows, y.shape[1], dtype=y.dtype, device=y.device)
        with _on(y):
            unmix_columns[(triton.cdiv(y.shape[1], sides.columns),)](
                y, A.order.int().to(y.device), A.Q_a.T.to(y).contiguous(), A.Q_b.T.to(y).contiguous(), x,
                A.rows, y.shape[1], y.stride(0), sides.a, sides.b,
                A=sides.A, B=sides.B, C=sides.columns, **OPTIONS,
            )  # fmt: skip
        return x, bool(torch.isfinite(x).all())

    def _sides(self, mixing: RowMixing, rows: Tensor, out: Tensor) -> _Sides | None:
        """The tile of a program; None where a column does not fit into one."""
        a, b = mixing.Q_a.shape[0], mixing.Q_b.shape[0]
        A, B = _side(a), _side(b)
        if a == 1 or TILE[rows.dtype] < A * B or rows.stride(1) != 1 or out.stride(1) != 1:
            return None
        return _Sides(a, b, A, B, max(1, 2 * TILE[rows.dtype] // (A * B)))


class _Sides(NamedTuple):
    """A grid of a·b rows, padded to A·B, and how many columns a program has."""

    a: int
    b: int
    A: int
    B: int
    columns: int


def _side(size: int) -> int:
    """The next power of two, as tiles have it."""
    return max(LEAST_SIDE, 1 << (size - 1).bit_length())


def _on(x: Tensor) -> Any:
    """Kernels are launched on the current device."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
