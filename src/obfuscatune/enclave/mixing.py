"""Fresh mixing of a call's rows: A [x; N], and back.

    m = n + s rows, s >= the profile's shield rows, rounded up so that m = a·b is near-square
    A = (Q_a ⊗ Q_b) P        P a permutation, Q Haar; all drawn anew for every crossing
    N (s, p)                 normal, scaled to the root mean square of x

The Kronecker product is dense: each row that the worker sees is a combination of *all* rows of the
call. N is isotropic, so it is drawn in the worker's basis directly: N and N R are alike for orthogonal R.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import covering_grid, haar, kronecker_rows

DENSE_BELOW = 32  # rows; up to here one dense factor costs no more than two small ones


class Mixing(Protocol):
    """What one crossing does to its rows."""

    def mix(self, x: Tensor) -> Tensor:
        """(n, p) -> (m, p), float64 or float32."""

    def unmix(self, y: Tensor) -> Tensor:
        """(m, q) -> (n, q): the inverse on the rows that were not shield rows."""


class Mixer(Protocol):
    """Draws the mixing of each crossing."""

    def draw(self, rows: int) -> Mixing:
        """The mixing for one crossing of ``rows`` rows."""


class KroneckerMixer:
    """Draws a fresh ``A`` and fresh shield rows for every crossing."""

    def __init__(self, shield_rows: int, stream: SecretStream) -> None:
        self._shield_rows = shield_rows
        self._stream = stream

    def draw(self, rows: int) -> KroneckerMixing:
        """Secrets for one crossing of ``rows`` >= 1 rows."""
        wanted = rows + self._shield_rows
        a, b = (1, wanted) if wanted <= DENSE_BELOW else covering_grid(wanted)
        stream = self._stream
        return KroneckerMixing(rows, stream.permutation(a * b), haar(stream, a), haar(stream, b), stream)


class KroneckerMixing:
    """One crossing's A (m, m), and the source of its shield rows."""

    def __init__(self, rows: int, places: Tensor, Q_a: Tensor, Q_b: Tensor, stream: SecretStream) -> None:
        self._rows, self._places = rows, places  # where each row of [x; N] goes
        self._sources = torch.argsort(places).remainder_(rows)  # which row of x to lay there; N overwrites its own
        self._Q_a, self._Q_b = Q_a, Q_b
        self._stream = stream

    def mix(self, x: Tensor) -> Tensor:
        """A [x; N] for x (n, p)."""
        stacked = torch.index_select(x, 0, self._sources.to(x.device))
        stacked.index_copy_(0, self._places[self._rows :].to(x.device), self._shield(x))
        return kronecker_rows(self._Q_a.to(x), self._Q_b.to(x), stacked)

    def unmix(self, y: Tensor) -> Tensor:
        """(Aᵀ y)[:n] for y (m, q)."""
        stacked = kronecker_rows(self._Q_a.T.to(y), self._Q_b.T.to(y), y)
        return torch.index_select(stacked, 0, self._places[: self._rows].to(y.device))

    def _shield(self, x: Tensor) -> Tensor:
        """N (m - n, p): normal, as large as x is on average; of unit size where x is zero."""
        count, p = self._places.numel() - self._rows, x.shape[1]
        rms = float(torch.linalg.vector_norm(x)) / (x.numel() ** 0.5)
        return self._stream.normal(count, p, dtype=x.dtype).to(x.device).mul_(rms or 1.0)


class NoMixing:
    """A = 1, no shield rows: the worker sees x R as it is. The paper's scheme."""

    def draw(self, rows: int) -> NoMixing:
        """Itself: there is nothing to draw."""
        return self

    def mix(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def unmix(self, y: Tensor) -> Tensor:
        """y."""
        return y
