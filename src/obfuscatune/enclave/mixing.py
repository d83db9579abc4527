"""Fresh mixing of a call's rows: A [x; N], and back.

    m = n + s rows, s >= the profile's shield rows; of many rows, rounded up so that m = a·b is near-square
    A = Q                    up to 32 rows
    A = (Q_a ⊗ Q_b) P        of more; P a permutation, Q Haar; all anew for every crossing
    N (s, p)                 normal, scaled to the root mean square of x

Both are dense: each row that the worker sees is a combination of *all* rows of the call. N is isotropic,
so it is drawn in the worker's basis directly: N and N R are alike for orthogonal R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels.mixing import MixingOfFew
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.link.pending import NOT_FINITE, check_product
from obfuscatune.enclave.orthogonal import kronecker_rows
from obfuscatune.enclave.sums import product_in_parts
from obfuscatune.wire.errors import BadReply

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.rows import MixingOfMany

DENSE_BELOW = 32  # rows; up to here one dense factor costs no more than two small ones


class Mixing(Protocol):
    """What one crossing does to its rows."""

    @property
    def rows(self) -> int:
        """m: how many rows cross."""

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """(n, p) -> `out` (m, p), float64 or float32; `scale` is the root mean square of x."""

    def sent(self, scale: float) -> float:
        """Root mean square of the elements of X*, for `scale` as it was mixed with."""

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """X* v (m, k), float64, for x (n, p) as it was just mixed and v (p, k), without reading X* back."""

    def unmix(self, y: Tensor) -> Tensor:
        """(m, q) -> (n, q), in memory of its own: the inverse on the rows that were not shield rows.

        y may lie where the worker can change it at any moment, so only the result is looked at.

        Raises:
            BadReply: y contained NaN or infinity.
        """


@dataclass(frozen=True, eq=False)
class FewMixing:
    """The secrets of one crossing of few rows, and the memory that they lie in."""

    secrets: MixingOfFew

    @property
    def rows(self) -> int:
        """m."""
        return self.secrets.Q.shape[0]

    def sent(self, n: int, scale: float) -> float:
        """As `Mixing.sent`, of n rows."""
        return _size_of_sent(n, self.rows, scale, self.secrets.loudness)

    def image(self, v: Tensor) -> Tensor:
        """X* v (m, k), float64, for v (p, k), of the rows that were just mixed, without reading X* back."""
        return self.secrets.mixed_by.double() @ product_in_parts(self.secrets.stack, v)


class DenseMixing:
    """A = Q (m, m) for one crossing of few rows, and the source of its shield rows."""

    def __init__(self, rows: int, Q: Tensor, stream: SecretStream, shield_scale: float) -> None:
        self._rows, self._Q = rows, Q
        self._stream = stream
        self._shield_scale = shield_scale

    @property
    def rows(self) -> int:
        """m."""
        return self._Q.shape[0]

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """Q [x; N] for x (n, p). Shield rows: as large as x on average, times the scale."""
        shield = self._stream.normal(self.rows - self._rows, x.shape[1], dtype=x.dtype).to(x.device)
        self._shield = shield.mul_(self._shield_scale * (scale or 1.0))
        _product(self._Q.to(x), torch.cat([x, shield]), out)

    def sent(self, scale: float) -> float:
        """As `Mixing.sent`."""
        return _size_of_sent(self._rows, self.rows, scale, self._shield_scale)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """Q [x; N] v."""
        parts = torch.cat([product_in_parts(x, v), product_in_parts(self._shield.to(x), v)])
        return self._Q.to(parts) @ parts

    def unmix(self, y: Tensor) -> Tensor:
        """(Qᵀ y)[:n] for y (m, q)."""
        x = y.new_empty(self._rows, y.shape[1])
        _product(self._Q[:, : self._rows].T.contiguous().to(y), y, x)
        return check_product(x)


def _size_of_sent(n: int, m: int, scale: float, shield_scale: float) -> float:
    """Root mean square of the elements of A [x; N]: as of [x; N], n rows of x and m - n shield rows."""
    shield = shield_scale * (scale or 1.0)
    return math.sqrt((n * scale**2 + (m - n) * shield**2) / m)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right, for few rows: on this thread, since waking others takes longer."""
    code = kernels.code_for(right)
    if code is None or not (right.is_contiguous() and out.is_contiguous()):
        torch.mm(left, right, out=out)
        return
    from obfuscatune.enclave.kernels.rows import multiply

    multiply(left, right, out, code)


class KroneckerMixing:
    """One crossing's A (m, m) for many rows, and the source of its shield rows."""

    def __init__(
        self, rows: int, order: Tensor, Q_a: Tensor, Q_b: Tensor, stream: SecretStream, shield_scale: float
    ) -> None:
        self._rows = rows
        self._order = order  # which row of [x; N] lies at each place
        self._prepared: dict[torch.dtype, MixingOfMany] = {}
        self._Q_a, self._Q_b = Q_a, Q_b
        self._stream, self._shield_scale = stream, shield_scale
        self.shield = Q_a.new_empty(0, 0)
        """N (s, p), once it is mixed."""

    @property
    def rows(self) -> int:
        """m = a·b."""
        return self._order.numel()

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """A [x; N] for x (n, p). Shield rows: as large as x on average, times the scale."""
        shield = self._stream.normal(self.rows - self._rows, x.shape[1], dtype=x.dtype)
        self.shield = shield.mul_(self._shield_scale * (scale or 1.0))
        prepared = self._for_kernels(x) if out.is_contiguous() else None
        if prepared is None:
            self._mix_by_torch(x, shield, out)
        else:
            prepared.mix(x, shield, out)

    def sent(self, scale: float) -> float:
        """As `Mixing.sent`."""
        return _size_of_sent(self._rows, self.rows, scale, self._shield_scale)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """A [x; N] v = A [x v; N v]."""
        x_v, shield_v = product_in_parts(x, v), product_in_parts(self.shield.to(x), v)
        out = x_v.new_empty(self.rows, v.shape[1])
        self._mix_by_torch(x_v, shield_v, out)
        return out

    def unmix(self, y: Tensor) -> Tensor:
        """(Aᵀ y)[:n] for y (m, q)."""
        prepared = self._for_kernels(y) if y.is_contiguous() else None
        if prepared is None:
            return self._unmix_by_torch(y)
        x, finite = prepared.unmix(y)
        if not finite:
            raise BadReply(NOT_FINITE)
        return x

    def _for_kernels(self, like: Tensor) -> MixingOfMany | None:
        """A as the kernels take it for such rows, prepared once for their dtype; None where torch is to compute."""
        code = kernels.code_for(like)
        if code is None:
            return None
        prepared = self._prepared.get(like.dtype)
        if prepared is None:
            from obfuscatune.enclave.kernels.rows import MixingOfMany

            prepared = MixingOfMany(self._order, self._rows, self._Q_a.to(like), self._Q_b.to(like), code)
            self._prepared[like.dtype] = prepared
        return prepared

    def _mix_by_torch(self, x: Tensor, shield: Tensor, out: Tensor) -> None:
        sources = self._order.remainder(self._rows)  # N overwrites what is laid in its places
        stacked = torch.index_select(x, 0, sources.to(x.device))
        stacked.index_copy_(0, self._places()[self._rows :].to(x.device), shield.to(x.device))
        kronecker_rows(self._Q_a.to(x), self._Q_b.to(x), stacked, out)

    def _unmix_by_torch(self, y: Tensor) -> Tensor:
        stacked = kronecker_rows(self._Q_a.T.to(y), self._Q_b.T.to(y), y)
        return check_product(torch.index_select(stacked, 0, self._places()[: self._rows].to(y.device)))

    def _places(self) -> Tensor:
        """Where each row of [x; N] goes."""
        return torch.argsort(self._order)


@dataclass(frozen=True)
class NoMixing:
    """A = 1, no shield rows: the worker sees x R as it is. The paper's scheme."""

    rows: int

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """x."""
        out.copy_(x)

    def sent(self, scale: float) -> float:
        """That of x."""
        return scale

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """x v."""
        return product_in_parts(x, v)

    def unmix(self, y: Tensor) -> Tensor:
        """y, copied."""
        return check_product(y.clone())
