"""``structured``: a product of cheap orthogonal factors, the default. Costs O(p sqrt p) per row.

    R = Π₁ · (Q_a ⊗ Q_b) · Π₂                              where p = a·b, near-square
    R = Π₁ · [(Q_a ⊗ Q_b) ⊕ 1] · Π₂ · [1 ⊕ (Q_c ⊗ Q_d)] · Π₃     otherwise (primes too)
    R = Q                                                  where p <= 64: dense is as cheap

Π are secret permutations, Q small secret Haar matrices. The Kronecker product is dense: each
coordinate that the worker sees depends on all p. Π₁ takes the features out of their natural
order (heads, groups), in pairs where there is one grid and p is even: that is half the work, and
neighbours mean nothing to each other. The last Π hides the grid from the worker. Where p has no near-square
factorisation the first grid leaves fewer than sqrt(p) coordinates over, and the second grid,
laid from the other end behind a permutation that brings them there, covers them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels.interface import Grid, Rotation
from obfuscatune.enclave.kernels.native import whole
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import haar, inner_grid, kronecker_rows
from obfuscatune.enclave.transforms.base import OrthogonalTransform

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import RotationOfFew

DENSE_BELOW = 64  # up to here one dense factor costs no more than two small ones


class StructuredTransform(OrthogonalTransform):
    """R as a product of permutations and Kronecker products of small Haar matrices."""

    name = "structured"

    def __init__(self, dim: int, stream: SecretStream) -> None:
        super().__init__(dim)
        a, b = (1, dim) if dim <= DENSE_BELOW else inner_grid(dim)
        self._covered = a * b
        grids = 1 if self._covered == dim else 2
        first = stream.permutation(dim // 2 if grids == 1 and dim % 2 == 0 else dim)
        between = [self._draw_between(stream)] if grids == 2 else []
        self._permutations = [first, *between, stream.permutation(dim)]
        self._pairs = [(haar(stream, a), haar(stream, b)) for _ in range(grids)]
        self._rotations: dict[tuple[torch.dtype, torch.device, bool], Rotation] = {}

    def inverse_plus(self, x: Tensor, bias: Tensor) -> Tensor:
        """x R⁻¹ + bias, in one pass where native kernels apply."""
        return self._act(x, lambda rows, _: self._rotate(rows, undo=True, plus=bias.detach().to(rows)))

    def weight_left(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """R⁻¹ W = Rᵀ W for W (dim, q): what `apply` does to features is done to rows here.

        The outer permutations move numbers of W's dtype, which is the same as to move wide ones and costs half.
        """
        if W.dtype == wide:
            result = W.clone(memory_format=torch.contiguous_format)
            if self.left_in_place(result, wide=wide):
                return result
        first, Q_a, Q_b, second, *rest = self._factors_in(wide, W.device)
        x = permute_rows(W, first).to(wide)
        if len(self._pairs) == 1:
            return permute_rows(kronecker_rows(Q_a.T, Q_b.T, x).to(W.dtype), second)
        Q_c, Q_d, last, *_ = rest
        covered, start = self._covered, self.dim - self._covered
        x = permute_rows(torch.cat([kronecker_rows(Q_a.T, Q_b.T, x[:covered]), x[covered:]]), second)
        x = torch.cat([x[:start], kronecker_rows(Q_c.T, Q_d.T, x[start:])])
        return permute_rows(x.to(W.dtype), last)

    def left_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """By native kernels: each grid in one pass, with the permutations before and after it."""
        fits = W.dtype == wide and W.shape[0] == self.dim > DENSE_BELOW
        native = kernels.native_for(W) if fits else None
        if native is None:
            return False
        everywhere = torch.arange(self.dim)
        picked, starts = whole(self._permutations[0], self.dim), (0, self.dim - self._covered)
        for start, (Q_a, Q_b), permutation in zip(starts, self._pairs, self._permutations[1:], strict=False):
            placed = torch.argsort(permutation)
            grid = slice(start, start + self._covered)
            rest = torch.cat([everywhere[:start], everywhere[grid.stop :]])
            outside = W[picked[rest]]
            native.mix_in_place(W, picked[grid], placed[grid], Q_a.T.to(W), Q_b.T.to(W))
            W[placed[rest]] = outside
            picked = everywhere
        return True

    def right_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """By native kernels, row by row or tile by tile of rows."""
        native = kernels.native_for(W) if W.dtype == wide and W.is_contiguous() else None
        if native is None:
            return False
        native.rotate(W, self._rotation(W.dtype, W.device, undo=False), out=W)
        return True

    @property
    def parameter_count(self) -> int:
        """Degrees of freedom of the small matrices, and the entries of the permutations."""
        continuous = sum(Q.shape[0] * (Q.shape[0] - 1) // 2 for pair in self._pairs for Q in pair)
        return continuous + sum(permutation.numel() for permutation in self._permutations)

    def _master_factors(self) -> tuple[Tensor, ...]:
        """Π₁, Q_a, Q_b, Π₂ (, Q_c, Q_d, Π₃), then the inverse permutations in the same order."""
        first, *others = self._permutations
        factors = [first]
        for (Q_a, Q_b), permutation in zip(self._pairs, others, strict=True):
            factors += [Q_a, Q_b, permutation]
        return (*factors, *(torch.argsort(permutation) for permutation in self._permutations))

    def _apply(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return self._rotate(x, undo=False)

    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return self._rotate(x, undo=True)

    def _rotate(self, x: Tensor, *, undo: bool, plus: Tensor | None = None) -> Tensor:
        """x R, or x R⁻¹, plus a row."""
        return kernels.kernels_for(x).rotate(x, self._rotation(x.dtype, x.device, undo=undo), plus=plus)

    def of_few(self, rows: int, dtype: torch.dtype, *, undo: bool) -> RotationOfFew | None:
        """By native kernels."""
        x = torch.empty(1, self.dim, dtype=dtype)
        native = kernels.native_for(x) if self.dim > DENSE_BELOW else None
        if native is None or rows >= native.table.lanes // 2:
            return None
        return native.of_few(self._rotation(dtype, x.device, undo=undo))

    def _rotation(self, dtype: torch.dtype, device: torch.device, *, undo: bool) -> Rotation:
        key = dtype, device, undo
        if key not in self._rotations:
            first, *factors = self._factors_in(dtype, device)[: 1 + 3 * len(self._pairs)]
            starts, steps = (0, self.dim - self._covered), range(0, len(factors), 3)
            grids = tuple(Grid(start, *factors[i : i + 2]) for start, i in zip(starts, steps, strict=False))
            R = Rotation((first, *factors[2::3]), grids)
            self._rotations[key] = R.inverse() if undo else R
        return self._rotations[key]

    def _draw_between(self, stream: SecretStream) -> Tensor:
        """A permutation that leaves no coordinate outside both grids: of all of these, each as likely.

        About one in p would: then a feature went to the worker as it is but for its place and the mixing of rows.
        """
        left_over = self.dim - self._covered
        while True:
            permutation = stream.permutation(self.dim)
            if bool((permutation[:left_over] < self._covered).all()):
                return permutation


def permute_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Πᵀ x for x (p, n): row i of the result is row `permutation[i]` of x; one of p / 2 moves pairs of rows."""
    return torch.index_select(x, 0, whole(permutation, x.shape[0]))
