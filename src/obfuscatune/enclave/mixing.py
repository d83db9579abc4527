"""Fresh mixing of a call's rows: A [D x; N], and back.

    m = n + s rows, s >= the profile's shield rows; of many rows, rounded up so that m = a·b is near-square
    D = diag(2^-e)           brings each row to a root mean square in (1/2, 1], or to 3/4
    A = Q                    up to 32 rows
    A = (Q_a ⊗ Q_b) P        of more; P a permutation, Q Haar; all anew for every request
    N (s, p)                 normal, of the size of the scaled rows

Both are dense: each row that the worker sees is a combination of *all* rows of the call. N is isotropic, so it is drawn
in the worker's basis directly: N and N R are alike for orthogonal R.

**Scales.** Mixing spreads the rounding error of each row over all: beside a row that is a thousand times as large as
the others, as the first token's often is, the others would lose three digits. So each row is multiplied by a power of
two of its own, and its product back: D⁻¹ (D x W) = x W. Powers of two round nothing. Rows of 16-bit numbers are brought
to one size exactly, so that the rounding of what is sent costs each the same. The scales stay in the enclave: of the
size of a row nothing is sent.

**Secrets.** A and N are drawn when the rows are there, and nothing is drawn ahead. A copy of the enclave (a fork, a
virtual machine that is resumed twice from one snapshot) would send what was drawn ahead as its original does, and the
difference of the two requests would show the text's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.client.requests import check_finite, check_product, not_finite
from obfuscatune.enclave.kernels.interface import RowMixing
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import covering_grid, haar
from obfuscatune.native import MOST_FEW

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.native import MixingOfFew

SIZE_OF_ROWS = 0.75
"""Root mean square of scaled 16-bit rows, and the middle of what others have; that of shield rows."""
LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1022}
"""Of a scale: beyond, it or its inverse is no normal number. Rows beyond stay smaller or larger than the others."""
_SQUARES = {torch.float32: 2.0**50, torch.float64: 2.0**450}
"""Sizes up to which, and of whose inverse on, the sum of a row's squares neither overflows nor vanishes."""


@dataclass(frozen=True)
class RowScales:
    """One factor for each row of x (n, p), in float64 where x is, and in float32 otherwise.

    A power of two, unless x has 16 bits: see above.
    """

    down: Tensor
    """(n, 1)."""
    up: Tensor
    """1 / down (n, 1); 0 for a row of zeros, whose product is nothing but the others' rounding errors."""
    mean_square: float
    """Of all elements of D x."""

    @classmethod
    def of(cls, x: Tensor) -> RowScales:
        """The scales of x (n, p), of any floating dtype, on any device. A row of zeros stays one.

        Raises:
            NonFiniteError: some element is NaN or infinite.
        """
        x = x.detach()
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=wide)
        sizes = norms.double().cpu().numpy() / math.sqrt(x.shape[1])
        doubtful = ~((sizes > 1 / _SQUARES[wide]) & (sizes < _SQUARES[wide]))
        is_ordinary = not doubtful.any()
        if not is_ordinary:
            sizes[doubtful] = _sizes_by_peaks(x[torch.from_numpy(doubtful).to(x.device)].to(wide))
        if x.itemsize == 2:
            up = np.where(sizes > 0, sizes / SIZE_OF_ROWS, 1.0)
        else:
            mantissas, exponents = np.frexp(sizes)
            up = np.ldexp(1.0, exponents - (mantissas == 0.5))
        if not is_ordinary:
            np.clip(up, 2.0 ** -LARGEST_EXPONENT[wide], 2.0 ** LARGEST_EXPONENT[wide], out=up)
        down = 1 / up
        if not is_ordinary:
            up[sizes == 0] = 0
        scaled = sizes * down
        column_down, column_up = (torch.from_numpy(powers).to(x.device, wide).unsqueeze(-1) for powers in (down, up))
        return cls(column_down, column_up, float(scaled @ scaled) / len(scaled))

    def scaled(self, x: Tensor) -> Tensor:
        """D x (n, p) in the dtype of the scales, contiguous, in memory of its own."""
        return torch.mul(x.detach(), self.down, out=self.down.new_empty(x.shape))

    def undo(self, y: Tensor) -> Tensor:
        """D⁻¹ y in the place of y (n, q)."""
        return y.mul_(self.up)


def _sizes_by_peaks(rows: Tensor) -> NDArray[np.float64]:
    """The root mean squares (k,) of rows (k, p) whose squares may overflow or vanish."""
    check_finite(rows)
    peaks = torch.linalg.vector_norm(rows, ord=math.inf, dim=1)
    peaks = torch.where(peaks == 0, 1.0, peaks)
    norms = torch.linalg.vector_norm(rows / peaks.unsqueeze(1), dim=1)  # from 1 on, or 0
    sizes: NDArray[np.float64] = (peaks.double() * norms.double() / math.sqrt(rows.shape[1])).cpu().numpy()
    return sizes


DENSE_BELOW = MOST_FEW  # rows; up to here one dense factor costs no more than two small ones, and kernels take them


class Mixing(Protocol):
    """What one request does to its rows: `scaled`, a rotation, `mix`; then `unmix` on the product."""

    @property
    def rows(self) -> int:
        """m: how many rows are sent."""

    @property
    def size(self) -> float:
        """Root mean square of the elements of X*, as the enclave knows it: its rows' own, and the shield's expected."""

    @property
    def mean_square(self) -> float:
        """Of all elements of the scaled rows: at most 1, unless a row was too large to be scaled down."""

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

    _scales: RowScales

    @property
    def size(self) -> float:
        """As `Mixing.size`."""
        return _size(self._scales.up.shape[0], self.rows, self._scales.mean_square)

    @property
    @abstractmethod
    def rows(self) -> int:
        """m."""

    @property
    def mean_square(self) -> float:
        """As `Mixing.mean_square`."""
        return self._scales.mean_square

    def scaled(self, x: Tensor) -> Tensor:
        """D x; the scales are kept."""
        self._scales = RowScales.of(x)
        return self._scales.scaled(x)

    def scaled_back(self, y: Tensor) -> Tensor:
        """D⁻¹ y."""
        return self._scales.undo(y)


def _size(n: int, m: int, mean_square: float) -> float:
    """Root mean square of the elements of n scaled rows, and the m - n shield rows beside them."""
    return math.sqrt((n * mean_square + (m - n) * SIZE_OF_ROWS**2) / m)


class FewMixing:
    """The secrets of one request of few rows, as the kernels take them: they scale and mix, and undo both."""

    def __init__(self, n: int, m: int, secrets: MixingOfFew) -> None:
        self._n, self.rows, self.secrets = n, m, secrets

    @property
    def size(self) -> float:
        """As `Mixing.size`, once rows were laid down."""
        return _size(self._n, self.rows, self.mean_square)

    @property
    def mean_square(self) -> float:
        """As `Mixing.mean_square`, once rows were laid down."""
        found: float = self.secrets.job.mean_square
        return found


class DenseMixing(_Scaled):
    """A = Q (m, m) for one request of few rows, and the source of its shield rows."""

    def __init__(self, rows: int, Q: Tensor, stream: SecretStream) -> None:
        self._rows, self._Q, self._stream = rows, Q, stream

    @property
    def rows(self) -> int:
        """m."""
        return self._Q.shape[0]

    def mix(self, x: Tensor, out: Tensor) -> None:
        """Q [x; N] for x (n, p)."""
        shield = self._stream.normal(self.rows - self._rows, x.shape[1], dtype=x.dtype).to(x.device)
        self._shield = shield.mul_(SIZE_OF_ROWS)
        rows = torch.cat([x, shield])
        kernels.kernels_for(rows).multiply(self._Q.to(x), rows, out)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """Q [x; N] v."""
        images = torch.cat([kernels.project(rows, v).images for rows in (x, self._shield.to(x))])
        return self._Q.to(images) @ images

    def unmix(self, y: Tensor) -> Tensor:
        """(Qᵀ y)[:n] for y (m, q)."""
        x = y.new_empty(self._rows, y.shape[1])
        kernels.kernels_for(y).multiply(self._Q[:, : self._rows].T.contiguous().to(y), y, x)
        return check_product(x)


class KroneckerMixing(_Scaled):
    """One crossing's A (m, m) for many rows, and the source of its shield rows."""

    def __init__(self, A: RowMixing, stream: SecretStream) -> None:
        self._A, self._stream = A, stream
        self.shield = A.Q_a.new_empty(0, 0)
        """N (s, p), once it is mixed."""

    @property
    def rows(self) -> int:
        """m = a·b."""
        return self._A.order.numel()

    def mix(self, x: Tensor, out: Tensor) -> None:
        """A [x; N] for x (n, p)."""
        shield = self._stream.normal(self.rows - self._A.rows, x.shape[1], dtype=x.dtype)
        self.shield = shield.mul_(SIZE_OF_ROWS)
        kernels.kernels_for(x).mix(x, self.shield, self._A, out)

    def image(self, x: Tensor, v: Tensor) -> Tensor:
        """A [x; N] v = A [x v; N v]."""
        x_v, shield_v = (kernels.project(rows, v).images for rows in (x, self.shield.to(x)))
        out = x_v.new_empty(self.rows, v.shape[1])
        kernels.REFERENCE.mix(x_v, shield_v, self._A, out)
        return out

    def unmix(self, y: Tensor) -> Tensor:
        """(Aᵀ y)[:n] for y (m, q)."""
        x, finite = kernels.kernels_for(y).unmix(y, self._A)
        if not finite:
            raise not_finite()
        return x


class NoMixing:
    """A = 1, no shield rows: the worker sees x R as it is. The paper's scheme."""

    def __init__(self, rows: int) -> None:
        self.rows, self.size, self.mean_square = rows, 0.0, math.inf  # nothing is scaled

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
        return kernels.project(x, v).images

    def unmix(self, y: Tensor) -> Tensor:
        """y, copied."""
        return check_product(y.clone())

    def scaled_back(self, y: Tensor) -> Tensor:
        """y."""
        return y


class Mixer(Protocol):
    """Draws the mixing of each request."""

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """The mixing for a request of few rows, as kernels take it; None where `draw` is to be asked."""

    def draw(self, rows: int, width: int) -> Mixing:
        """The mixing for one request of ``rows`` rows of ``width`` elements."""


def bucket(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: powers of two, and three halves of them."""
    power = 1 << max(rows - 1, 0).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if power >= 4 and rows <= three_quarters else power


class KroneckerMixer:
    """Draws a fresh ``A`` and fresh shield rows for every request."""

    def __init__(self, shield_rows: int, stream: SecretStream, *, in_buckets: bool = False) -> None:
        """
        Args:
            shield_rows: random rows beside those of the request, at least.
            stream: `SecretStream.fresh()`, but in tests.
            in_buckets: whether rows are filled up with more of them, to the next number of `bucket`.
        """
        self._shield_rows, self._in_buckets = shield_rows, in_buckets
        self._stream = stream

    def _wanted(self, rows: int) -> int:
        return (bucket(rows) if self._in_buckets else rows) + self._shield_rows

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """Secrets for one request of ``rows`` >= 1 rows, if A is dense and there are kernels for it."""
        m, native = self._wanted(rows), kernels.native_of(dtype.itemsize)
        if m > DENSE_BELOW or native is None:
            return None
        drawn = self._stream.normal(m * m + (m - rows) * width, dtype=dtype)  # at once: most of it is calls
        return FewMixing(rows, m, native.mixing_of_few(rows, m, width, drawn, SIZE_OF_ROWS))

    def draw(self, rows: int, width: int) -> Mixing:
        """Secrets for one request of ``rows`` >= 1 rows of ``width`` elements."""
        wanted = self._wanted(rows)
        if wanted <= DENSE_BELOW:
            return DenseMixing(rows, haar(self._stream, wanted), self._stream)
        a, b = covering_grid(wanted)
        Q_a, Q_b = haar(self._stream, a), haar(self._stream, b)
        A = RowMixing(self._stream.permutation(a * b), rows, Q_a, Q_b)
        return KroneckerMixing(A, self._stream)


class NoMixer:
    """Draws nothing."""

    def draw(self, rows: int, width: int) -> NoMixing:
        """A = 1."""
        return NoMixing(rows)

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Nothing that a kernel takes."""
