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
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import haar, inner_grid, kronecker_columns, kronecker_rows, permute_columns
from obfuscatune.enclave.transforms.base import OrthogonalTransform

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.compiled import Compiled
    from obfuscatune.enclave.kernels.rotation import Rotation, RotationOfFew

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
        self._narrowest = b
        self._fused: dict[tuple[Compiled, bool, bool], Rotation | RotationOfFew] = {}

    def inverse_plus(self, x: Tensor, bias: Tensor) -> Tensor:
        """x R⁻¹ + bias, in one pass where the kernels apply."""
        fused = self._by_kernel(x, undo=True, plus=bias.detach()) if bias.is_contiguous() else None
        return super().inverse_plus(x, bias) if fused is None else fused

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

    def weight_right(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """W R for W (p, dim), likewise."""
        fused = self._by_kernel(W, undo=False) if W.dtype == wide else None
        if fused is not None:
            return fused
        first, Q_a, Q_b, second, *rest = self._factors_in(wide, W.device)
        x = permute_columns(W, first).to(wide)
        if len(self._pairs) == 1:
            return permute_columns(kronecker_columns(x, Q_a, Q_b).to(W.dtype), second)
        Q_c, Q_d, last, *_ = rest
        x = permute_columns(self._on_first(x, Q_a, Q_b), second)
        return permute_columns(self._on_last(x, Q_c, Q_d).to(W.dtype), last)

    def left_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """By the kernels: each grid in one pass, with the permutations before and after it."""
        fits = W.dtype == wide and W.shape[0] == self.dim > DENSE_BELOW
        code = kernels.code_for(W) if fits else None
        if code is None:
            return False
        from obfuscatune.enclave.kernels.rows import on_rows

        everywhere = torch.arange(self.dim)
        picked, starts = whole(self._permutations[0], self.dim), (0, self.dim - self._covered)
        for start, (Q_a, Q_b), permutation in zip(starts, self._pairs, self._permutations[1:], strict=False):
            placed = torch.argsort(permutation)
            grid = slice(start, start + self._covered)
            rest = torch.cat([everywhere[:start], everywhere[grid.stop :]])
            outside = W[picked[rest]]
            on_rows(W, picked[grid], placed[grid], Q_a.T.to(W), Q_b.T.to(W), code)
            W[placed[rest]] = outside
            picked = everywhere
        return True

    def right_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """By the kernels, row by row or panel by panel of rows."""
        fits = W.dtype == wide and W.is_contiguous()
        return fits and self._by_kernel(W, undo=False, out=W) is not None

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
        fused = self._by_kernel(x, undo=False)
        return self._apply_by_torch(x, factors) if fused is None else fused

    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        fused = self._by_kernel(x, undo=True)
        return self._inverse_by_torch(x, factors) if fused is None else fused

    def _apply_by_torch(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        permutation, Q_a, Q_b, *rest = factors
        x = permute_columns(x, permutation)
        if len(self._pairs) == 1:
            return permute_columns(kronecker_columns(x, Q_a, Q_b), rest[0])
        between, Q_c, Q_d, last, *_ = rest
        x = permute_columns(self._on_first(x, Q_a, Q_b), between)
        return permute_columns(self._on_last(x, Q_c, Q_d), last)

    def _inverse_by_torch(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        if len(self._pairs) == 1:
            _, Q_a, Q_b, _, undo_first, undo_last = factors
            x = kronecker_columns(permute_columns(x, undo_last), Q_a.T, Q_b.T)
            return permute_columns(x, undo_first)
        _, Q_a, Q_b, _, Q_c, Q_d, _, undo_first, undo_between, undo_last = factors
        x = self._on_last(permute_columns(x, undo_last), Q_c.T, Q_d.T)
        x = self._on_first(permute_columns(x, undo_between), Q_a.T, Q_b.T)
        return permute_columns(x, undo_first)

    def _by_kernel(
        self, x: Tensor, *, undo: bool, out: Tensor | None = None, plus: Tensor | None = None
    ) -> Tensor | None:
        """x R, or x R⁻¹, plus a row, by the kernels; None where torch is to. `out` may be x."""
        fits = x.shape[-1] == self.dim > DENSE_BELOW
        code = kernels.code_for(x) if fits else None
        if code is None:
            return None
        few = x.shape[0] < code.shape.lanes // 2  # these leave most of a panel empty
        if few and self._narrowest < code.shape.width:
            return None
        result, _ = self._kernel(code, x.dtype, undo=undo, few=few)(x, out, plus)
        return result

    def of_few(self, rows: int, dtype: torch.dtype, *, undo: bool) -> RotationOfFew | None:
        """By the kernel for few rows."""
        code = kernels.code_for(torch.empty(1, self.dim, dtype=dtype)) if self.dim > DENSE_BELOW else None
        if code is None or rows >= code.shape.lanes // 2 or self._narrowest < code.shape.width:
            return None
        return self._kernel(code, dtype, undo=undo, few=True)  # type: ignore[return-value]  # few: that kind

    def _kernel(self, code: Compiled, dtype: torch.dtype, *, undo: bool, few: bool) -> Rotation | RotationOfFew:
        key = code, undo, few
        if key not in self._fused:
            self._fused[key] = self._prepared(code, dtype, undo=undo, few=few)
        return self._fused[key]

    def _prepared(self, code: Compiled, dtype: torch.dtype, *, undo: bool, few: bool) -> Rotation | RotationOfFew:
        from obfuscatune.enclave.kernels.rotation import Grid, Rotation, RotationOfFew

        steps = [whole(permutation, self.dim) for permutation in self._permutations]
        starts = (0, self.dim - self._covered)
        grids = [
            Grid(start, Q_a.to(dtype), Q_b.to(dtype)) for start, (Q_a, Q_b) in zip(starts, self._pairs, strict=False)
        ]
        if undo:
            steps = [torch.argsort(permutation) for permutation in reversed(steps)]
            grids = [Grid(grid.start, grid.Q_a.T, grid.Q_b.T) for grid in reversed(grids)]
        return RotationOfFew(steps, grids, code) if few else Rotation(steps, grids, code)

    def _draw_between(self, stream: SecretStream) -> Tensor:
        """A permutation that leaves no coordinate outside both grids: of all of these, each as likely.

        About one in p would: then a feature went to the worker as it is but for its place and the mixing of rows.
        """
        left_over = self.dim - self._covered
        while True:
            permutation = stream.permutation(self.dim)
            if bool((permutation[:left_over] < self._covered).all()):
                return permutation

    def _on_first(self, x: Tensor, Q_a: Tensor, Q_b: Tensor) -> Tensor:
        covered, left_over = x[:, : self._covered], x[:, self._covered :]
        return torch.cat([kronecker_columns(covered, Q_a, Q_b), left_over], dim=1)

    def _on_last(self, x: Tensor, Q_a: Tensor, Q_b: Tensor) -> Tensor:
        start = self.dim - self._covered
        return torch.cat([x[:, :start], kronecker_columns(x[:, start:], Q_a, Q_b)], dim=1)


def permute_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Πᵀ x for x (p, n): row i of the result is row `permutation[i]` of x; one of p / 2 moves pairs of rows."""
    return torch.index_select(x, 0, whole(permutation, x.shape[0]))


def whole(permutation: Tensor, dim: int) -> Tensor:
    """A permutation of `dim` places, or of pairs of them, as one of places."""
    if 2 * permutation.numel() == dim:
        return torch.stack([2 * permutation, 2 * permutation + 1], dim=1).flatten()
    return permutation
