"""Transforms held as dense matrices: ``haar`` (the paper's), ``gaussian`` (its naive baseline), ``conditioned(kappa)``
(its ablation, App. B), and ``none`` or ``identity``, which protects nothing. All but the last cost p² for each row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import haar
from obfuscatune.enclave.transforms.base import OrthogonalTransform, Transform
from obfuscatune.errors import ConfigError

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import RotationOfFew


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


class DenseTransform(Transform):
    """R and R⁻¹, both (p, p) float64, as the subclass drew them: what need not be orthogonal."""

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


class GaussianTransform(DenseTransform):
    """R with independent normal entries of variance 1/p; R⁻¹ by LU in float64. Its condition number is not chosen."""

    name = "gaussian"

    def __init__(self, dim: int, stream: SecretStream) -> None:
        R = stream.normal(dim, dim) / math.sqrt(dim)
        super().__init__(R, torch.linalg.inv(R))

    @property
    def condition_number(self) -> float:
        """Measured by singular values; grows about as p, with heavy tails (Edelman 1988)."""
        values = torch.linalg.svdvals(self._R)
        return float(values[0] / values[-1])

    @property
    def parameter_count(self) -> int:
        """Every entry of R."""
        return self.dim * self.dim


class ConditionedTransform(DenseTransform):
    """R = Q_a S Q_b with singular values spaced evenly in the logarithm, their product 1."""

    name = "conditioned"

    def __init__(self, dim: int, stream: SecretStream, kappa: float) -> None:
        if not 1.0 <= kappa < 1e12:
            raise ConfigError(f"conditioned(kappa) needs 1 <= kappa < 1e12, got {kappa:g}")
        self._kappa = kappa if dim > 1 else 1.0
        Q_a, Q_b = haar(stream, dim), haar(stream, dim)
        S = torch.logspace(0.5, -0.5, dim, base=self._kappa, dtype=torch.float64)
        super().__init__(Q_a * S @ Q_b, Q_b.T / S @ Q_a.T)

    @property
    def condition_number(self) -> float:
        """kappa, by construction."""
        return self._kappa

    @property
    def parameter_count(self) -> int:
        """Degrees of freedom of the two orthogonal matrices; S is public."""
        return self.dim * (self.dim - 1)


class Identity(OrthogonalTransform):
    """R = 1: W lies open to the worker. For a public base under masks, and as ``identity`` for controls.

    A profile refuses it anywhere else.
    """

    name = "identity"

    def left_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """Does nothing: R is 1."""
        return True

    def right_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """Does nothing: R is 1."""
        return True

    def of_few(self, rows: int, dtype: torch.dtype, *, undo: bool) -> RotationOfFew | None:
        """Mixes, by native kernels, and turns nothing."""
        native = kernels.native_for(torch.empty(1, self.dim, dtype=dtype))
        if native is None or rows >= native.table.lanes // 2:
            return None
        return native.of_few_unrotated(self.dim)

    @property
    def parameter_count(self) -> int:
        """There is no secret."""
        return 0

    def _master_factors(self) -> tuple[Tensor, ...]:
        return ()

    def _apply(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x

    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x
