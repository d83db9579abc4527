"""A transform held as a dense matrix and its inverse: what ``gaussian`` and ``conditioned`` share."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.transforms.base import Transform


class DenseTransform(Transform):
    """R and R⁻¹, both (p, p) float64, as the subclass drew them."""

    def __init__(self, R: Tensor, R_inverse: Tensor) -> None:
        super().__init__(R.shape[0])
        self._R, self._R_inverse = R, R_inverse

    def weight_left(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """R⁻¹ W for W (dim, q), in one product: nothing is transposed."""
        return (self._factors_in(wide, W.device)[1] @ W.to(wide)).to(W.dtype)

    def _master_factors(self) -> tuple[Tensor, ...]:
        return (self._R, self._R_inverse)

    def _apply(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0]

    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[1]

    def _apply_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0].T

    def _inverse_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[1].T
