"""A page of memory in which a worker process says how long it has computed, and its parent when to count products."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_TOTALS = struct.Struct("<dddd")
_COUNTING_AT = 64
_BYTES = mmap.PAGESIZE


class Totals(NamedTuple):
    """Since the worker was started."""

    seconds: float = 0.0
    """In which it computed."""
    computations: float = 0.0
    flops: float = 0.0
    """Of the products, while they were counted."""
    nbytes: float = 0.0
    """That these products read and wrote."""

    def since(self, earlier: Totals) -> Totals:
        """What was added."""
        return Totals(*(a - b for a, b in zip(self, earlier, strict=True)))

    def plus(self, added: Totals) -> Totals:
        """Both together."""
        return Totals(*(a + b for a, b in zip(self, added, strict=True)))


class ClockPage:
    """The page, as either process sees it. Only the worker writes totals; they are read between two requests."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _BYTES)

    @property
    def totals(self) -> Totals:
        """What the worker computed so far."""
        return Totals(*_TOTALS.unpack_from(self._page))

    @totals.setter
    def totals(self, totals: Totals) -> None:
        _TOTALS.pack_into(self._page, 0, *totals)

    @property
    def counting(self) -> bool:
        """Whether products are to be counted, which slows them down."""
        return self._page[_COUNTING_AT] != 0

    @counting.setter
    def counting(self, wanted: bool) -> None:
        self._page[_COUNTING_AT] = int(wanted)
