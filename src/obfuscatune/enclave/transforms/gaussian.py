"""``gaussian``: the paper's naive baseline. Its condition number is whatever it happens to be."""

from __future__ import annotations

import math

import torch

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.transforms.dense import DenseTransform


class GaussianTransform(DenseTransform):
    """R with independent normal entries of variance 1/p; R⁻¹ by LU in float64."""

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
