"""Rotation, mixing, masks, sketches and normal deviates, each by torch's operations, and in C++ or Triton.

    interface   what a kernel is asked for, and the structured matrices that it is given
    reference   by torch: on every device, differentiable
    native      by the library of `csrc/`: one pass each, on the CPU
    gpu         by Triton, on a CUDA device: rotation and mixing; `gpu_programs`, what it compiles

Which of them computes is chosen here, from the tensor alone.
"""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune import native as _native
from obfuscatune.enclave.kernels.interface import SKETCHES, Kernels, Projection, Tolerance
from obfuscatune.enclave.kernels.native import Native
from obfuscatune.enclave.kernels.reference import Reference

__all__ = [
    "REFERENCE",
    "Kernels",
    "Native",
    "Projection",
    "Tolerance",
    "directions",
    "excess",
    "for_deviates",
    "grid_normal",
    "kernels_for",
    "mask_rows",
    "native_for",
    "project",
    "unmask_rows",
]

REFERENCE = Reference()


def kernels_for(x: Tensor) -> Kernels:
    """The kernels that compute on x (n, p)."""
    return native_for(x) or gpu_for(x) or REFERENCE


def gpu_for(x: Tensor) -> Kernels | None:
    """The kernels on a CUDA device where they apply to x, and Triton is installed, else None."""
    if x.device.type != "cuda" or x.dtype not in (torch.float32, torch.float64):
        return None
    if x.dim() != 2 or x.shape[0] < 1 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return _gpu()


@functools.cache
def _gpu() -> Kernels | None:
    """Triton comes with a torch for CUDA; it takes seconds to import, so nothing else imports it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from obfuscatune.enclave.kernels.gpu import Gpu

    return Gpu()


def native_for(x: Tensor) -> Native | None:
    """The native kernels where they apply to x, else None.

    They take float32 and float64 on the CPU, rows that are contiguous and at least as long as a tile's, and nothing
    that autograd is to differentiate.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    if x.dim() != 2 or x.shape[0] < 1 or x.stride(1) != 1 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    found = native_of(x.itemsize)
    return None if found is None or x.shape[1] < found.table.lanes else found


def for_deviates() -> Kernels:
    """The kernels that make normal deviates."""
    return native_of(4) or REFERENCE


def grid_normal(words: NDArray[np.uint64], deviation: float, grid: float) -> Tensor:
    """One-time masks from random words: `grid · ⌊z deviation / grid⌋`, z standard normal (Box and Muller, 1958).

    Rounded down, which keeps the lowest bits uniform: to the nearest, many numbers of few bits would be ties, and even.
    All 64 bits of each word are used. z is exact to 2⁻⁴⁹ of itself, as precise near 0 as in the tails, which end at 9.4
    standard deviations. The last bits of z depend on the instruction set, and r with them by a few grids: a mask is
    drawn once and kept, never drawn again by another machine.

    Args:
        words: uniform, uint64 (2k,), contiguous; k a multiple of 16. They may be written over.
        deviation: the standard deviation, in the units of `grid`. Up to 2⁵⁰ grids, all numbers within 8 standard
            deviations are whole multiples of `grid` that float64 holds exactly.
        grid: the distance between neighbours; a power of two.

    Returns:
        float64 (2k,), on the CPU; possibly in the words' memory.
    """
    return (native_of(8) or REFERENCE).grid_normal(words, deviation, grid)


def mask_rows(x: Tensor, r: Tensor, grid: float, out: Tensor) -> bool:
    """Round, mask and copy in one pass: out = grid · rint(x / grid) + r.

    Where r lies on the grid and neither term exceeds 2⁵² grids, the sum is exact: its low bits tell nothing of x.

    Args:
        x: (m, p), float32 or float64 for the native kernel, any dtype for torch.
        r: the masks, float64 (m, p), multiples of `grid`.
        grid: a power of two.
        out: float64 (m, p), such as the memory that is sent; it may be r.

    Returns:
        Whether x is finite. Where it is not, neither is `out`, which must not be sent then.
    """
    found = native_of(x.itemsize) if x.dtype in (torch.float32, torch.float64) else None
    fits = x.is_cpu and r.is_cpu and out.is_cpu and x.stride(1) == r.stride(1) == out.stride(1) == 1
    if found is None or x.numel() == 0 or not fits:
        return REFERENCE.mask_rows(x, r, grid, out)
    return found.mask_rows(x, r, grid, out)


def unmask_rows(y: Tensor, product: Tensor, out: Tensor) -> None:
    """Unmask, round and forget in one pass: out = y - product, then product = 0.

    y is read once, so it may lie where a worker can write to it.

    Args:
        y: float64 (m, q), what came of masked rows.
        product: float64 (m, q), what the masks made of the same matrix.
        out: (m, q), float32 or float64 for the native kernel, any dtype for torch.
    """
    found = native_of(out.itemsize) if out.dtype in (torch.float32, torch.float64) else None
    fits = y.is_cpu and product.is_cpu and out.is_cpu
    if found is None or not (fits and y.is_contiguous() and product.is_contiguous() and out.is_contiguous()):
        return REFERENCE.unmask_rows(y, product, out)
    return found.unmask_rows(y, product, out)


def project(x: Tensor, v: Tensor) -> Projection:
    """x v and the squares of x, as verification needs them: in float64, or nearly.

    Args:
        x: rows (n, p), any floating dtype, on any device.
        v: float64 (p, k); the native kernel takes 8 vectors.
    """
    found = native_of(x.itemsize) if x.dtype in (torch.float32, torch.float64) else None
    fits = x.is_cpu and v.is_cpu and v.shape[1] == SKETCHES and x.stride(1) == 1 and v.is_contiguous()
    if found is None or not fits:
        return REFERENCE.project(x, v)
    return found.project(x, v)


def directions(words: bytes, k: int) -> Tensor:
    """Secret directions for one check: orthonormal columns (8, k), float64, as likely as any others.

    Normal numbers (Box and Muller, 1958), then Gram and Schmidt. Native kernels use all 64 bits of each word.

    Args:
        words: 64·k random bytes.
        k: even.
    """
    return (native_of(8) or REFERENCE).directions(words, k)


def excess(product: Tensor, R: Tensor, U: Tensor, c: Tensor, tolerance: Tolerance) -> tuple[float, bool]:
    """How far a product is off: the largest |(product R - U) c| of any row over its tau.

    Args:
        product: (m, q), any floating dtype, on any device, where nobody else can write to it.
        R: float64 (q, 8).
        U: float64 (m, 8), contiguous, what the rows that were sent make of W* R.
        c: float64 (8, k), contiguous.
        tolerance: makes tau of the rows.

    Returns:
        It, infinite where anything in it is not finite; and whether all sums of squares are finite.
    """
    found = native_of(product.itemsize) if product.dtype in (torch.float32, torch.float64) else None
    fits = product.is_cpu and R.is_cpu and product.stride(1) == 1 and R.shape[1] == SKETCHES
    if found is None or not (fits and R.is_contiguous() and U.is_contiguous() and c.is_contiguous()):
        return REFERENCE.excess(product, R, U, c, tolerance)
    return found.excess(product, R, U, c, tolerance)


def native_of(itemsize: int) -> Native | None:
    """The native kernels for numbers of 4 or 8 bytes; None where there are none."""
    return _native_of(itemsize) if _native.are_there() else None


@functools.cache
def _native_of(itemsize: int) -> Native | None:
    table = _native.kernels(itemsize)
    return None if table is None else Native(table)
