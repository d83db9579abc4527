"""``identity``: no protection at all. For tests and positive controls; refused without an unsafe flag."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.enclave.transforms.base import OrthogonalTransform


class UnsafeIdentity(OrthogonalTransform):
    """R = 1: everything lies open to the worker."""

    name = "identity"

    def left_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """There is nothing to do."""
        return True

    def right_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """Likewise."""
        return True

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
