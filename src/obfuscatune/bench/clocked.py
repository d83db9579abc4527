"""A local worker whose computing is clocked: on a page of memory it says how long it has computed.

The parent says on the same page when products are to be counted. The worker's own program is clocked_worker.py, which
imports nothing of the enclave.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from obfuscatune.bench.network import within
from obfuscatune.bench.processes import scratch_folder

if TYPE_CHECKING:
    from obfuscatune.enclave.local_worker import LocalWorker

_TOTALS = struct.Struct("<dddd")
_COUNTING_AT = 64
_BYTES = mmap.PAGESIZE


class Totals(NamedTuple):
    """Totals since the worker was started."""

    seconds: float = 0.0
    """Time in which it computed products."""
    computations: float = 0.0
    flops: float = 0.0
    """Floating-point operations of the products, while counting was on."""
    nbytes: float = 0.0
    """Bytes that these products read and wrote."""

    def since(self, earlier: Totals) -> Totals:
        """The difference of two totals."""
        return Totals(*(a - b for a, b in zip(self, earlier, strict=True)))

    def plus(self, added: Totals) -> Totals:
        """The sum of two totals."""
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


@contextmanager
def clocked_worker(
    threads: int, listen: str | None = None, extra: tuple[str, ...] = (), namespace: str | None = None
) -> Iterator[tuple[LocalWorker, ClockPage]]:
    """A worker process on this machine that runs the usual program with a clock on it; it ends with the `with`.

    Args:
        threads: that it computes with.
        listen: its address; a unix socket of its own if None.
        extra: further options of `python -m obfuscatune.worker`.
        namespace: the network namespace that it runs in; None for this process's own.

    Raises:
        ConnectionLost: it did not start; the message holds the end of its stderr.
    """
    from obfuscatune.enclave.local_worker import LocalWorker

    with scratch_folder() as folder:
        page = Path(folder) / "clock"
        clock = ClockPage(page, create=True)
        program = ("obfuscatune.bench.clocked_worker", str(page))
        arguments = ["--threads", str(threads), *extra]
        with LocalWorker(arguments, program=program, listen=listen, within=within(namespace)) as worker:
            yield worker, clock
