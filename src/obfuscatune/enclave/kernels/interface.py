"""What rotation, mixing, masks and verification ask of the kernels, and the structured matrices that they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SKETCHES = 8
"""Columns of R and L that a matrix is sketched by."""


@dataclass(frozen=True, eq=False)
class Grid:
    """x -> x (Q_a ⊗ Q_b) on columns `start` to `start + a·b`; the others stay as they are."""

    start: int
    Q_a: Tensor
    Q_b: Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x Π₁ (Q_a ⊗ Q_b) Π₂, or with two grids x Π₁ (Q_a ⊗ Q_b) Π₂ (Q_c ⊗ Q_d) Π₃; in one dtype, on one device."""

    permutations: tuple[Tensor, ...]
    """int64 (p,) each, one more than grids: column j after Π is column `permutation[j]` before. Or (p / 2,), of pairs
    of columns."""
    grids: tuple[Grid, ...]
    """One or two."""
    prepared: dict[object, Any] = field(default_factory=dict, repr=False)
    """What the native kernels make of it at their first call, by kernels."""

    def inverse(self) -> Rotation:
        """x -> x R⁻¹."""
        permutations = tuple(torch.argsort(permutation) for permutation in reversed(self.permutations))
        grids = tuple(Grid(grid.start, grid.Q_a.T, grid.Q_b.T) for grid in reversed(self.grids))
        return Rotation(permutations, grids)


@dataclass(frozen=True, eq=False)
class RowMixing:
    """A = (Q_a ⊗ Q_b) P for the n rows of x above m - n shield rows; in one dtype."""

    order: Tensor
    """int64 (m,), a permutation: which row of [x; shield] lies at each place of the grid."""
    rows: int
    """n."""
    Q_a: Tensor
    Q_b: Tensor
    """(a, a) and (b, b), a·b = m."""
    prepared: dict[object, Any] = field(default_factory=dict, repr=False)
    """What the native kernels make of it at their first call, by kernels."""


class Tolerance(NamedTuple):
    """What rounding explains of a product's rows: tau = unit · (|row| + expected + |rows|) + of_masks.

    |rows| is the root mean square of all |row|: one may be small because large ones cancelled in mixing, and then errs
    as they do. No row counts for more than `largest`.
    """

    unit: float
    expected: float
    of_masks: float
    largest: float

    def of(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each row tau (m,), by their sums of squares (m,)."""
        squares = np.minimum(squares, self.largest**2)
        tau: NDArray[np.float64] = self.unit * (np.sqrt(squares) + (self.expected + math.sqrt(squares.mean())))
        return tau + self.of_masks


class Projection(NamedTuple):
    """What verification asks of rows x (n, p) and vectors v (p, k)."""

    images: Tensor
    """x v (n, k), float64."""
    squares: Tensor
    """The sum of squares of each row of x (n,), float64."""


class Kernels(Protocol):
    """One implementation in torch, `reference`, and one in C++, `native`. They agree to rounding."""

    def rotate(self, x: Tensor, R: Rotation, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x R (n, p), plus a row (p,) of x's dtype where one is given; for x (n, p), n >= 1.

        `out` (n, p), contiguous, takes the result where it is given; it may be x.
        """

    def mix(self, x: Tensor, shield: Tensor, A: RowMixing, out: Tensor) -> None:
        """out (m, p) = A [x; shield] for x (n, p) and shield (m - n, p)."""

    def unmix(self, y: Tensor, A: RowMixing) -> tuple[Tensor, bool]:
        """(Aᵀ y)[:n] for y (m, q), and whether it is finite.

        y may change at any moment: what is told to be finite is what was read.
        """

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out (m, q) = left (m, k) right (k, q), for few rows, on this thread."""

    def sketch(self, W: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, float]:
        """W R (p, 8), Wᵀ L (q, 8) and the root of the sum of all squares, for W (p, q), R (q, 8) and L (p, 8)."""

    def project(self, x: Tensor, v: Tensor) -> Projection:
        """x v and the squares of x (n, p), for v (p, k), float64; see `kernels.project`."""

    def directions(self, words: bytes, k: int) -> Tensor:
        """Orthonormal columns (8, k), float64, from 64·k random bytes; see `kernels.directions`."""

    def excess(self, product: Tensor, R: Tensor, U: Tensor, c: Tensor, tolerance: Tolerance) -> tuple[float, bool]:
        """The largest |(product R - U) c| of any row over its tau, and more; see `kernels.excess`."""

    def deviates(self, words: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Uniform words (2k,) as standard normal deviates (2k,), possibly in their place; k a multiple of 16."""

    def grid_normal(self, words: NDArray[np.uint64], deviation: float, grid: float) -> Tensor:
        """Uniform words (2k,) as float64 `grid · ⌊z deviation / grid⌋` (2k,); see `kernels.grid_normal`."""

    def mask_rows(self, x: Tensor, r: Tensor, grid: float, out: Tensor) -> bool:
        """out = grid · rint(x / grid) + r for x, r and out (m, p); see `kernels.mask_rows`."""

    def unmask_rows(self, y: Tensor, product: Tensor, out: Tensor) -> None:
        """out = y - product, then product = 0, for y, product and out (m, q); see `kernels.unmask_rows`."""
