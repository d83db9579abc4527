"""``conditioned(kappa)``: a matrix of chosen condition number, the paper's ablation (its App. B)."""

from __future__ import annotations

import torch

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import haar
from obfuscatune.enclave.transforms.dense import DenseTransform
from obfuscatune.wire.errors import ConfigError


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
