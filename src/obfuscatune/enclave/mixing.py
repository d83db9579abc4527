"""Fresh mixing of a call's rows: A [x; N], and back.

    m = n + s rows, s >= the profile's shield rows, rounded up so that m = a·b is near-square
    A = (Q_a ⊗ Q_b) P        P a permutation, Q Haar; all drawn anew for every crossing
    N (s, p)                 normal, scaled to the root mean square of x

The Kronecker product is dense: each row that the worker sees is a combination of *all* rows of the
call. N is isotropic, so it is drawn in the worker's basis directly: N and N R are alike for orthogonal R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.orthogonal import covering_grid, haar, kronecker_rows

DENSE_BELOW = 32  # rows; up to here one dense factor costs no more than two small ones


class Mixing(Protocol):
    """What one crossing does to its rows."""

    @property
    def rows(self) -> int:
        """m: how many rows cross."""

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """(n, p) -> `out` (m, p), float64 or float32; `scale` is the root mean square of x."""

    def unmix(self, y: Tensor) -> Tensor:
        """(m, q) -> (n, q), in memory of its own: the inverse on the rows that were not shield rows."""


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

    @property
    def rows(self) -> int:
        """m = a·b."""
        return self._places.numel()

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """A [x; N] for x (n, p). Shield rows are as large as x is on average; of unit size where x is zero."""
        stacked = torch.index_select(x, 0, self._sources.to(x.device))
        shield = self._stream.normal(self.rows - self._rows, x.shape[1], dtype=x.dtype)
        stacked.index_copy_(0, self._places[self._rows :].to(x.device), shield.mul_(scale or 1.0).to(x.device))
        kronecker_rows(self._Q_a.to(x), self._Q_b.to(x), stacked, out)

    def unmix(self, y: Tensor) -> Tensor:
        """(Aᵀ y)[:n] for y (m, q)."""
        stacked = kronecker_rows(self._Q_a.T.to(y), self._Q_b.T.to(y), y)
        return torch.index_select(stacked, 0, self._places[: self._rows].to(y.device))


@dataclass(frozen=True)
class NoMixing:
    """A = 1, no shield rows: the worker sees x R as it is. The paper's scheme."""

    rows: int

    def mix(self, x: Tensor, scale: float, out: Tensor) -> None:
        """x."""
        out.copy_(x)

    def unmix(self, y: Tensor) -> Tensor:
        """y, copied: what a worker sent may lie where the worker can change it."""
        return y.clone()


class NoMixer:
    """Draws nothing."""

    def draw(self, rows: int) -> NoMixing:
        """A = 1."""
        return NoMixing(rows)
