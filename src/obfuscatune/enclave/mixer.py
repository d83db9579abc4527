"""Who draws the mixing of each crossing, and much of it ahead: while a worker multiplies, there is a moment for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.kernels.mixing import MixingOfFew
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import DENSE_BELOW, DenseMixing, FewMixing, KroneckerMixing, Mixing, NoMixing
from obfuscatune.enclave.orthogonal import covering_grid, haar_batch

DRAWN_AHEAD = 64
"""Factors that are drawn together, at most: one QR of many small matrices takes little longer than of one."""
FEW_AHEAD = 64
"""Crossings of few rows whose memory is kept to be drawn into."""
ELEMENTS_AHEAD = 1 << 18
"""Of factors that are drawn together, and of shield rows that are drawn ahead: 2 MiB."""
MANY_AHEAD = 16
"""Kinds of crossings of many rows for which the secrets of the next ones are kept ready."""
MANY_TOGETHER = 4
"""Crossings of many rows whose secrets are drawn together, at most: the first takes longer than the others, because the
worker's product has pushed code and tables out of the caches."""


class Mixer(Protocol):
    """Draws the mixing of each crossing."""

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """The mixing for a crossing of few rows, as kernels take it; None where `draw` is to be asked."""

    def draw_ahead(self, like: Mixing | FewMixing) -> None:
        """A moment's work for a coming crossing, probably like this one, for whoever would otherwise wait."""

    def give_back(self, mixing: FewMixing) -> None:
        """What `draw_few` drew, after the crossing that it was for."""

    def draw(self, rows: int, width: int) -> Mixing:
        """The mixing for one crossing of ``rows`` rows of ``width`` elements."""


class KroneckerMixer:
    """Draws a fresh ``A`` and fresh shield rows for every crossing."""

    def __init__(
        self, shield_rows: int, stream: SecretStream, *, shield_scale: float = 1.0, full_rank: bool = False
    ) -> None:
        """`shield_scale`: size of the shield rows over that of x. `full_rank`: at least as many rows as elements."""
        self._shield_rows, self._shield_scale = shield_rows, shield_scale
        self._full_rank = full_rank
        self._stream = stream
        self._factors = _DrawnAhead(stream)
        self._few = _FewAhead(stream, self._factors, shield_scale)
        self._many = _ManyAhead(stream, self._draw_many)

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> FewMixing | None:
        """Likewise; in memory of its own until it is given back."""
        if self._full_rank or rows + self._shield_rows > DENSE_BELOW:
            return None
        return self._few.take(rows, self._shield_rows, width, dtype)

    def draw_ahead(self, like: Mixing | FewMixing) -> None:
        """Of few rows, for one crossing like those before; of many, for the next ones like this, if there are none."""
        if isinstance(like, FewMixing):
            self._few.draw_one()
        elif isinstance(like, KroneckerMixing):
            self._many.draw_for_more(like)

    def give_back(self, mixing: FewMixing) -> None:
        """To be drawn into."""
        self._few.give_back(mixing)

    def draw(self, rows: int, width: int) -> Mixing:
        """Secrets for one crossing of ``rows`` >= 1 rows of ``width`` elements."""
        wanted = rows + self._shield_rows
        if self._full_rank:
            wanted = max(wanted, width)
        if wanted <= DENSE_BELOW:
            return DenseMixing(rows, self._factors.take(wanted), self._stream, self._shield_scale)
        return self._many.take(rows, width) or self._draw_many(rows, wanted)

    def _draw_many(self, rows: int, wanted: int) -> KroneckerMixing:
        a, b = covering_grid(wanted)
        Q_a, Q_b = self._factors.take(a), self._factors.take(b)
        return KroneckerMixing(rows, self._stream.permutation(a * b), Q_a, Q_b, self._stream, self._shield_scale)


class _FewAhead:
    """What crossings of few rows take, drawn while others are waited for, into memory that is used again."""

    def __init__(self, stream: SecretStream, factors: _DrawnAhead, loudness: float) -> None:
        self._stream, self._factors, self._loudness = stream, factors, loudness
        self._ready: dict[tuple[int, int, torch.dtype], list[FewMixing]] = {}
        self._used: deque[FewMixing] = deque(maxlen=FEW_AHEAD)

    def take(self, rows: int, shield_rows: int, width: int, dtype: torch.dtype) -> FewMixing:
        """Secrets that were never used."""
        key = rows, width, dtype
        ready = self._ready.setdefault(key, [])
        while True:
            try:
                mixing = ready.pop()
            except IndexError:  # another thread may have taken the last
                break
            if mixing.renewals == self._stream.renewals:
                return mixing
        m = rows + shield_rows
        return self._drawn(key, torch.empty(m, width, dtype=dtype), torch.empty(m, m, dtype=dtype))

    def give_back(self, mixing: FewMixing) -> None:
        """Its crossing is over: its memory may be drawn into."""
        self._used.append(mixing)

    def draw_one(self) -> None:
        """Anew, in the place of what was given back first."""
        try:
            used = self._used.popleft()
        except IndexError:
            return
        self._ready[used.key].append(self._drawn(used.key, used.secrets.stack, used.secrets.mixed_by))

    def _drawn(self, key: tuple[int, int, torch.dtype], stack: Tensor, mixed_by: Tensor) -> FewMixing:
        rows, width, dtype = key
        m, renewals = stack.shape[0], self._stream.renewals
        stack[rows:] = self._stream.normal(m - rows, width, dtype=dtype)
        Q = self._factors.take(m).to(dtype)
        return FewMixing(key, MixingOfFew(Q, stack, mixed_by, self._loudness), renewals)


class _ManyAhead:
    """Mixings of many rows for crossings to come, drawn while others are waited for."""

    def __init__(self, stream: SecretStream, draw: Callable[[int, int], KroneckerMixing]) -> None:
        """`draw` draws one for n rows, m with the shield's."""
        self._stream, self._draw = stream, draw
        self.ready: dict[tuple[int, int], list[KroneckerMixing]] = {}
        """By rows and width; that of the last crossing last."""

    def take(self, rows: int, width: int) -> KroneckerMixing | None:
        """One that was never used; None where there is none."""
        ready = self.ready.get((rows, width), [])
        while True:
            try:
                mixing = ready.pop()
            except IndexError:  # another thread may have taken the last
                return None
            if mixing.renewals == self._stream.renewals:
                return mixing

    def draw_for_more(self, like: KroneckerMixing) -> None:
        """For crossings like that one, if none are ready; not where the shield is large."""
        if like.shield.numel() > ELEMENTS_AHEAD:
            return
        self.ready[like.kind] = self.ready.pop(like.kind, []) or self._drawn(like)
        if len(self.ready) > MANY_AHEAD:
            self.ready.pop(next(iter(self.ready.copy())), None)  # other threads draw as well

    def _drawn(self, like: KroneckerMixing) -> list[KroneckerMixing]:
        (rows, width), shield = like.kind, like.shield
        count = max(min(MANY_TOGETHER, ELEMENTS_AHEAD // max(shield.numel(), 1)), 1)
        mixings = [self._draw(rows, like.rows) for _ in range(count)]
        for mixing in mixings:
            mixing.draw_shield_ahead(width, shield.dtype)
        return mixings


class _DrawnAhead:
    """Haar matrices of a few sizes, each taken once."""

    def __init__(self, stream: SecretStream) -> None:
        self._stream, self._renewals = stream, stream.renewals
        self._ready: dict[int, list[Tensor]] = {}

    def take(self, size: int) -> Tensor:
        """Q (size, size), float64."""
        if self._renewals != self._stream.renewals:
            self._renewals, self._ready = self._stream.renewals, {}
        ready = self._ready.setdefault(size, [])
        while True:
            try:
                return ready.pop()
            except IndexError:  # another thread may have taken what this one had drawn
                count = max(min(DRAWN_AHEAD, ELEMENTS_AHEAD // size**2), 1)
                ready.extend(haar_batch(self._stream, count, size).unbind())


class NoMixer:
    """Draws nothing."""

    def draw(self, rows: int, width: int) -> NoMixing:
        """A = 1."""
        return NoMixing(rows)

    def draw_few(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Nothing that a kernel takes."""

    def draw_ahead(self, like: Mixing | FewMixing) -> None:
        """Nothing."""

    def give_back(self, mixing: FewMixing) -> None:
        """Nothing."""
