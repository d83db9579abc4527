"""Who draws the secrets of each request, at the moment when its rows are there: A, and the shield rows N.

Nothing is drawn ahead. A copy of the enclave (a fork, a virtual machine that is resumed twice from one snapshot) would
send what was drawn ahead as its original does, and the difference of the two requests would show the text's.
"""

from __future__ import annotations

from typing import Protocol

import torch

from obfuscatune.enclave.kernels.interface import MixingOfFew, RowMixing
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import (
    DENSE_BELOW,
    DenseMixing,
    FewMixing,
    KroneckerMixing,
    Mixing,
    NoMixing,
)
from obfuscatune.enclave.orthogonal import covering_grid, haar, haar_from
from obfuscatune.enclave.scaling import SIZE_OF_ROWS


class Mixer(Protocol):
    """Draws the mixing of each request."""

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """The mixing for a request of few rows, as kernels take it; None where `draw` is to be asked."""

    def draw(self, rows: int, width: int) -> Mixing:
        """The mixing for one request of ``rows`` rows of ``width`` elements."""


class KroneckerMixer:
    """Draws a fresh ``A`` and fresh shield rows for every request."""

    def __init__(
        self, shield_rows: int, stream: SecretStream, *, shield_scale: float = 1.0, full_rank: bool = False
    ) -> None:
        """
        Args:
            shield_rows: random rows beside those of the request, at least.
            stream: `SecretStream.fresh()`, but in tests.
            shield_scale: size of the shield rows over that of the scaled rows beside them.
            full_rank: whether a request has at least as many rows as they have elements.
        """
        self._shield_rows, self._shield_size = shield_rows, shield_scale * SIZE_OF_ROWS
        self._full_rank = full_rank
        self._stream = stream

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """Secrets for one request of ``rows`` >= 1 rows, if A is dense."""
        m = rows + self._shield_rows
        if self._full_rank or m > DENSE_BELOW:
            return None
        drawn = self._stream.normal(m * m + (m - rows) * width, dtype=dtype)  # at once: most of it is calls
        A, stack = haar_from(drawn[: m * m].view(m, m).double()).to(dtype), torch.empty(m, width, dtype=dtype)
        torch.mul(drawn[m * m :].view(m - rows, width), self._shield_size, out=stack[rows:])
        return FewMixing(MixingOfFew(A, A.T.contiguous(), stack), self._shield_size)

    def draw(self, rows: int, width: int) -> Mixing:
        """Secrets for one request of ``rows`` >= 1 rows of ``width`` elements."""
        wanted = rows + self._shield_rows
        if self._full_rank:
            wanted = max(wanted, width)
        if wanted <= DENSE_BELOW:
            return DenseMixing(rows, haar(self._stream, wanted), self._stream, self._shield_size)
        a, b = covering_grid(wanted)
        Q_a, Q_b = haar(self._stream, a), haar(self._stream, b)
        A = RowMixing(self._stream.permutation(a * b), rows, Q_a, Q_b)
        return KroneckerMixing(A, self._stream, self._shield_size)


class NoMixer:
    """Draws nothing."""

    def draw(self, rows: int, width: int) -> NoMixing:
        """A = 1."""
        return NoMixing(rows)

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Nothing that a kernel takes."""
