"""``haar``: a dense uniformly random orthogonal matrix, the paper's choice. Costs p² per row."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import haar
from obfuscatune.enclave.transforms.base import OrthogonalTransform


class HaarTransform(OrthogonalTransform):
    """R = Q, Haar-distributed in O(p)."""

    name = "haar"

    def __init__(self, dim: int, stream: SecretStream) -> None:
        super().__init__(dim)
        self._Q = haar(stream, dim)

    @property
    def parameter_count(self) -> int:
        """Dimension of O(p)."""
        return self.dim * (self.dim - 1) // 2

    def weight_left(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """R⁻¹ W = Qᵀ W for W (dim, q), in one product: nothing is transposed."""
        return (self._factors_in(wide, W.device)[0].T @ W.to(wide)).to(W.dtype)

    def _master_factors(self) -> tuple[Tensor, ...]:
        return (self._Q,)

    def _apply(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0]

    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0].T
