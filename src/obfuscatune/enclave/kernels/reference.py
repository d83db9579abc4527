"""The kernels by torch's operations: on every device, differentiable, and what the native ones are tested against."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune.enclave.kernels.interface import SKETCHES, Grid, Projection, Rotation, RowMixing, Tolerance
from obfuscatune.enclave.orthogonal import kronecker_columns, kronecker_rows, permute_columns

Float = TypeVar("Float", bound=np.floating)
PART = 256
"""Elements that are summed in their own dtype before the sum goes on in float64."""


class Reference:
    """See `interface.Kernels`."""

    def rotate(self, x: Tensor, R: Rotation, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x R + plus."""
        first, *others = R.permutations
        y = permute_columns(x, first)
        for grid, permutation in zip(R.grids, others, strict=True):
            y = permute_columns(_on_grid(y, grid), permutation)
        y = y if plus is None else y.add_(plus)
        return y if out is None else out.copy_(y)

    def mix(self, x: Tensor, shield: Tensor, A: RowMixing, out: Tensor) -> None:
        """A [x; shield]."""
        sources = A.order.remainder(A.rows)  # shield rows overwrite what is laid in their places
        stacked = torch.index_select(x, 0, sources.to(x.device))
        stacked.index_copy_(0, torch.argsort(A.order)[A.rows :].to(x.device), shield.to(x.device))
        kronecker_rows(A.Q_a.to(x), A.Q_b.to(x), stacked, out)

    def unmix(self, y: Tensor, A: RowMixing) -> tuple[Tensor, bool]:
        """(Aᵀ y)[:n]."""
        stacked = kronecker_rows(A.Q_a.T.to(y), A.Q_b.T.to(y), y)
        x = torch.index_select(stacked, 0, torch.argsort(A.order)[: A.rows].to(y.device))
        return x, bool(torch.isfinite(x).all())

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Left right."""
        torch.mm(left, right, out=out)

    def sketch(self, W: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, float]:
        """W R, Wᵀ L and |W|."""
        return W @ R, W.T @ L, float(torch.linalg.vector_norm(W, dtype=torch.float64))

    def project(self, x: Tensor, v: Tensor) -> Projection:
        """In parts: what a sum in float32 errs by over thousands of elements is as much as a check tolerates."""
        narrow = v.to(x)
        images = torch.zeros(x.shape[0], v.shape[1], dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[1], PART):
            images += x[:, start : start + PART] @ narrow[start : start + PART]
        return Projection(images, torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square_())

    def directions(self, words: bytes, k: int) -> Tensor:
        """By Gram and Schmidt: QR takes longer. 53 bits of each word are used."""
        uniform = (np.frombuffer(words, np.uint64) >> np.uint64(11)) * 2.0**-53
        c = box_muller(uniform).reshape(SKETCHES, k)
        for j in range(k):
            column = c[:, j]
            if j:
                column -= c[:, :j] @ (column @ c[:, :j])
            column /= math.sqrt(column @ column)
        return torch.from_numpy(c)

    def excess(self, product: Tensor, R: Tensor, U: Tensor, c: Tensor, tolerance: Tolerance) -> tuple[float, bool]:
        """By `project`, then in float64."""
        images, squares = (of_rows.cpu().numpy() for of_rows in self.project(product, R))
        with np.errstate(over="ignore", invalid="ignore"):  # numbers of the worker's, as large as it likes
            deviation = np.abs((images - U.numpy()) @ c.numpy()).max(axis=1)
            tau = tolerance.of(squares)
            excess = float(np.where(np.isfinite(tau), deviation / tau, math.inf).max())
        return excess if math.isfinite(excess) else math.inf, bool(np.isfinite(squares).all())

    def deviates(self, words: NDArray[np.uint32]) -> NDArray[np.float32]:
        """24 bits of each word make a uniform number."""
        return box_muller((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))

    def grid_normal(self, words: NDArray[np.uint64], deviation: float, grid: float) -> Tensor:
        """All 64 bits of each word are used; nothing cancels, neither near 0 nor in the tail."""
        first, second = words.reshape(2, -1)
        below, above = first * 2.0**-64, np.negative(first) * 2.0**-64  # 1 - k 2⁻⁶⁴, and k 2⁻⁶⁴ where k is below 2⁶⁴
        near = below < 0.5
        radius = np.sqrt(-2 * np.where(near, np.log1p(-np.where(near, below, 0)), np.log(np.where(near, 1, above))))
        turned = second + np.uint64(1 << 61)  # quarter turns, and a rest of half a quarter at most
        quarters = turned >> np.uint64(62)
        rest = (turned & np.uint64((1 << 62) - 1)).view(np.int64) - (1 << 61)
        angle = rest * (math.pi * 2.0**-63)
        sine, cosine = np.sin(angle), np.cos(angle)
        z = radius * np.stack([_of_quarter(quarters + 1, sine, cosine), _of_quarter(quarters, sine, cosine)])
        return torch.from_numpy((np.floor(z * (deviation / grid)) * grid).reshape(-1))

    def mask_rows(self, x: Tensor, r: Tensor, grid: float, out: Tensor) -> bool:
        """One operation of torch after another."""
        rounded = x.to(torch.float64, copy=True).div_(grid).round_().mul_(grid)
        torch.add(rounded, r, out=out)
        return bool(torch.isfinite(x).all())

    def unmask_rows(self, y: Tensor, product: Tensor, out: Tensor) -> None:
        """One operation of torch after another."""
        out.copy_(y - product)
        product.zero_()


def box_muller(uniform: NDArray[Float]) -> NDArray[Float]:
    """Uniform in [0, 1), as many bits as the significand holds, (2k,) -> normal (2k,) (Box and Muller, 1958).

    numpy and not torch: a few hundred numbers are drawn for each request, and it starts no threads.
    """
    u, angle = uniform.reshape(2, -1)
    radius = np.sqrt(-2 * np.log1p(-u))  # 1 - u is never 0
    angle *= 2 * math.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _of_quarter(
    quarters: NDArray[np.uint64], even: NDArray[np.float64], odd: NDArray[np.float64]
) -> NDArray[np.float64]:
    """±even or ±odd: bit 0 of `quarters` chooses between them, bit 1 is the sign."""
    found: NDArray[np.float64] = np.where(quarters & np.uint64(1), odd, even) * (1.0 - (quarters & np.uint64(2)))
    return found


def _on_grid(x: Tensor, grid: Grid) -> Tensor:
    covered = grid.Q_a.shape[0] * grid.Q_b.shape[0]
    if covered == x.shape[1]:
        return kronecker_columns(x, grid.Q_a, grid.Q_b)
    stop = grid.start + covered
    turned = kronecker_columns(x[:, grid.start : stop], grid.Q_a, grid.Q_b)
    return torch.cat([x[:, : grid.start], turned, x[:, stop:]], dim=1)
