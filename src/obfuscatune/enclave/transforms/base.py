"""What a transform is: a secret invertible R (p, p) that acts on the last dimension."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obfuscatune.errors import ProtectionError

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import RotationOfFew

_Product = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def widen(x: Tensor) -> Tensor:
    """x in float32 if it is bfloat16 or float16; otherwise x itself. Tensors of 16 bits are computed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Transform(ABC):
    """A secret matrix R (dim, dim), applied without being built where its structure allows.

    All four products take x (..., dim) in any floating-point dtype and return the same shape, dtype and device.
    bfloat16 and float16 are computed in float32 and rounded once, at the end.
    """

    name: str

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ProtectionError(f"a transform needs at least one dimension, got {dim}")
        self.dim = dim
        self._factors: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def apply(self, x: Tensor) -> Tensor:
        """x R."""
        return self._act(x, self._apply)

    def inverse(self, x: Tensor) -> Tensor:
        """x R⁻¹."""
        return self._act(x, self._inverse)

    def inverse_plus(self, x: Tensor, bias: Tensor) -> Tensor:
        """x R⁻¹ + bias, for bias (dim,) of x's dtype; nothing of it is differentiated."""
        return self.inverse(x).add_(bias)

    def apply_transpose(self, x: Tensor) -> Tensor:
        """x Rᵀ."""
        return self._act(x, self._apply_transpose)

    def inverse_transpose(self, x: Tensor) -> Tensor:
        """x R⁻ᵀ."""
        return self._act(x, self._inverse_transpose)

    def weight_left(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """R⁻¹ W for W (dim, q): computed in `wide`, rounded once to W's dtype."""
        return self.inverse_transpose(W.T.to(wide)).T.to(W.dtype)

    def weight_right(self, W: Tensor, *, wide: torch.dtype = torch.float64) -> Tensor:
        """W R for W (p, dim): computed in `wide`, rounded once to W's dtype."""
        return self.apply(W.to(wide)).to(W.dtype)

    def left_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """W (dim, q), contiguous, becomes `weight_left(W)`, by all of torch's threads and without memory for another W.

        Returns:
            False, with W as it was, where there is no such way: the caller goes tile by tile then.
        """
        return False

    def right_in_place(self, W: Tensor, *, wide: torch.dtype) -> bool:
        """As `left_in_place`, for `weight_right(W)` of W (p, dim)."""
        return False

    def of_few(self, rows: int, dtype: torch.dtype, *, undo: bool) -> RotationOfFew | None:
        """What turns so few rows by R, or R⁻¹ where `undo`, and mixes them on the way; None where nothing does."""
        return None

    @property
    @abstractmethod
    def condition_number(self) -> float:
        """Ratio of R's extreme singular values: the most by which rounding can be amplified."""

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """How many secret numbers describe R."""

    @abstractmethod
    def _master_factors(self) -> tuple[Tensor, ...]:
        """The secret factors in float64 (or int64) on the CPU, as drawn."""

    @abstractmethod
    def _apply(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """x R for x (n, dim) and the factors in its dtype."""

    @abstractmethod
    def _inverse(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """x R⁻¹ for x (n, dim) and the factors in its dtype."""

    @abstractmethod
    def _apply_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """x Rᵀ for x (n, dim) and the factors in its dtype."""

    @abstractmethod
    def _inverse_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """x R⁻ᵀ for x (n, dim) and the factors in its dtype."""

    def _act(self, x: Tensor, product: _Product) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ProtectionError(f"{self.name} transform of dimension {self.dim} met a tensor {tuple(x.shape)}")
        rows = widen(x.reshape(-1, self.dim))
        return product(rows, self._factors_in(rows.dtype, x.device)).view(x.shape).to(x.dtype)

    def _factors_in(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        cached = self._factors.get((dtype, device))
        if cached is None:
            cached = tuple(
                factor.to(device=device, dtype=dtype if factor.is_floating_point() else factor.dtype)
                for factor in self._master_factors()
            )
            self._factors[dtype, device] = cached
        return cached

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, <redacted>)"


class OrthogonalTransform(Transform):
    """R Rᵀ = 1: the inverse is the transpose, and nothing is amplified."""

    @property
    def condition_number(self) -> float:
        """Exactly 1."""
        return 1.0

    def _apply_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return self._inverse(x, factors)

    def _inverse_transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return self._apply(x, factors)
