"""Fresh mixing of a call's rows: A [D x; N], and back.

    m = n + s rows, s >= the profile's shield rows; of many rows, rounded up so that m = a·b is near-square
    D                        brings each row to a root mean square in (1/2, 1], or to 3/4 (`scaling`)
    A = Q                    up to 32 rows
    A = (Q_a ⊗ Q_b) P        of more; P a permutation, Q Haar; all anew for every request
    N (s, p)                 normal, of the size of the scaled rows

Both are dense: each row that the worker sees is a combination of *all* rows of the call. N is isotropic,
so it is drawn in the worker's basis directly: N and N R are alike for orthogonal R.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels.interface import MixingOfFew, RowMixing
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.link.pending import NOT_FINITE, check_finite, check_product
from obfuscatune.enclave.scaling import RowScales
from obfuscatune.enclave.sums import product_in_parts
from obfuscatune.wire.errors import BadReply

DENSE_BELOW = 32  # rows; up to here one dense factor costs no more than two small ones


class Mixing(Protocol):
    """What one request does to its rows: `scaled`, a rotation, `mix`; then `unmix` on the product."""

    @property
    def rows(self) -> int:
        """m: how many rows are sent."""

    @property
    def size(self) -> float:
        """Root mean square of the elements of X*, as the enclave knows it: its rows' own, and the shield's expected."""

    def scaled(self, x: Tensor) -> Tensor:
        """(n, p) in any dtype -> (n, p) in float64 or float32, ready to be rotated and mixed; memory of its own.

        Raises:
            NonFiniteError: x contains NaN or infinity.
        """

    def mix(self, x: Tensor, out: Tensor) -> None:
        """(n, p) -> `out` (m, p), for rows that were scaled, and rotated.

        Raises:
            NonFiniteError: x contains NaN or infinity.
        """

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """X* v (m, k), float64, for x (n, p) as it was just mixed and v (p, k), without reading X* back."""

    def unmix(self, y: Tensor) -> Tensor:
        """(m, q) -> (n, q), in memory of its own: the inverse on the rows that were not shield rows, still scaled.

        y may lie where the worker can change it at any moment, so only the result is looked at.

        Raises:
            BadReply: y contained NaN or infinity.
        """

    def scaled_back(self, y: Tensor) -> Tensor:
        """D⁻¹ y in the place of y (n, q), for rows that were unmixed."""


class _Scaled(ABC):
    """A mixing before which rows are scaled, and after which their products are scaled back."""

    _shield_size: float
    _scales: RowScales

    @property
    def size(self) -> float:
        """As `Mixing.size`."""
        n = self._scales.up.shape[0]
        shield = (self.rows - n) * self._shield_size**2
        return math.sqrt((n * self._scales.mean_square + shield) / self.rows)

    @property
    @abstractmethod
    def rows(self) -> int:
        """m."""

    def scaled(self, x: Tensor) -> Tensor:
        """D x; the scales are kept."""
        self._scales = RowScales.of(x)
        return self._scales.scaled(x)

    def scaled_back(self, y: Tensor) -> Tensor:
        """D⁻¹ y."""
        return self._scales.undo(y)


class FewMixing(_Scaled):
    """The secrets of one request of few rows, as the kernels take them."""

    def __init__(self, secrets: MixingOfFew, shield_size: float) -> None:
        self.secrets, self._shield_size = secrets, shield_size

    @property
    def rows(self) -> int:
        """m."""
        return self.secrets.A.shape[0]

    def image(self, v: Tensor) -> Tensor:
        """X* v (m, k), float64, for v (p, k), of the rows that were just mixed, without reading X* back."""
        return self.secrets.A.double() @ product_in_parts(self.secrets.stack, v)


class DenseMixing(_Scaled):
    """A = Q (m, m) for one request of few rows, and the source of its shield rows."""

    def __init__(self, rows: int, Q: Tensor, stream: SecretStream, shield_size: float) -> None:
        self._rows, self._Q = rows, Q
        self._stream, self._shield_size = stream, shield_size

    @property
    def rows(self) -> int:
        """m."""
        return self._Q.shape[0]

    def mix(self, x: Tensor, out: Tensor) -> None:
        """Q [x; N] for x (n, p)."""
        shield = self._stream.normal(self.rows - self._rows, x.shape[1], dtype=x.dtype).to(x.device)
        self._shield = shield.mul_(self._shield_size)
        rows = torch.cat([x, shield])
        kernels.kernels_for(rows).multiply(self._Q.to(x), rows, out)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """Q [x; N] v."""
        parts = torch.cat([product_in_parts(x, v), product_in_parts(self._shield.to(x), v)])
        return self._Q.to(parts) @ parts

    def unmix(self, y: Tensor) -> Tensor:
        """(Qᵀ y)[:n] for y (m, q)."""
        x = y.new_empty(self._rows, y.shape[1])
        kernels.kernels_for(y).multiply(self._Q[:, : self._rows].T.contiguous().to(y), y, x)
        return check_product(x)


class KroneckerMixing(_Scaled):
    """One crossing's A (m, m) for many rows, and the source of its shield rows."""

    def __init__(self, A: RowMixing, stream: SecretStream, shield_size: float) -> None:
        self._A, self._stream, self._shield_size = A, stream, shield_size
        self.shield = A.Q_a.new_empty(0, 0)
        """N (s, p), once it is mixed."""

    @property
    def rows(self) -> int:
        """m = a·b."""
        return self._A.order.numel()

    def mix(self, x: Tensor, out: Tensor) -> None:
        """A [x; N] for x (n, p)."""
        shield = self._stream.normal(self.rows - self._A.rows, x.shape[1], dtype=x.dtype)
        self.shield = shield.mul_(self._shield_size)
        kernels.kernels_for(x).mix(x, self.shield, self._A, out)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """A [x; N] v = A [x v; N v]."""
        x_v, shield_v = product_in_parts(x, v), product_in_parts(self.shield.to(x), v)
        out = x_v.new_empty(self.rows, v.shape[1])
        kernels.REFERENCE.mix(x_v, shield_v, self._A, out)
        return out

    def unmix(self, y: Tensor) -> Tensor:
        """(Aᵀ y)[:n] for y (m, q)."""
        x, finite = kernels.kernels_for(y).unmix(y, self._A)
        if not finite:
            raise BadReply(NOT_FINITE)
        return x


class NoMixing:
    """A = 1, no shield rows: the worker sees x R as it is. The paper's scheme."""

    def __init__(self, rows: int) -> None:
        self.rows, self.size = rows, 0.0

    def scaled(self, x: Tensor) -> Tensor:
        """x as it is, in float32 where it has 16 bits: what is not mixed costs no other row precision."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.detach().to(wide, copy=True, memory_format=torch.contiguous_format)

    def mix(self, x: Tensor, out: Tensor) -> None:
        """x."""
        check_finite(x)
        self.size = float(torch.linalg.vector_norm(x, dtype=torch.float64)) / math.sqrt(x.numel())
        out.copy_(x)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """x v."""
        return product_in_parts(x, v)

    def unmix(self, y: Tensor) -> Tensor:
        """y, copied."""
        return check_product(y.clone())

    def scaled_back(self, y: Tensor) -> Tensor:
        """y."""
        return y
