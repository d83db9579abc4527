"""The worker's own program with a clock on all that it computes; the first argument is the clock's page.

run as:  python -m obfuscatune.bench.clocked_worker PAGE --listen unix:/path ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from obfuscatune.process import settle_process

settle_process()

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.backend import Computer
from obfuscatune.bench.clocked import ClockPage, Totals
from obfuscatune.bench.measures import ProductCounter
from obfuscatune.worker.options import parse_arguments
from obfuscatune.worker.server import run

_PAGE_ARGUMENT = 1


class ClockedComputer(Computer):
    """Computes as any worker does, and writes down how long it took."""

    page: ClockPage

    @contextmanager
    def turn(self) -> Iterator[torch.device]:
        """See `Computer`."""
        counter = ProductCounter() if self.page.counting else None
        with super().turn() as device, self._clocked(counter), counter or nullcontext():
            yield device

    def multiply(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool) -> None:
        """See `Computer`."""
        counter = ProductCounter() if self.page.counting else None
        with self._clocked(counter):
            super().multiply(rows, matrix, out, transpose=transpose)
            if counter is not None:  # by its shapes: the kernel for few rows is no operation of torch
                counter.count(rows, matrix, out)

    @contextmanager
    def _clocked(self, counter: ProductCounter | None) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent = Totals(time.perf_counter() - started, 1)
        if counter is not None:
            spent = spent.plus(Totals(flops=counter.flops, nbytes=counter.nbytes))
        self.page.totals = self.page.totals.plus(spent)


if __name__ == "__main__":
    ClockedComputer.page = ClockPage(Path(sys.argv[_PAGE_ARGUMENT]))
    sys.exit(run(parse_arguments(sys.argv[_PAGE_ARGUMENT + 1 :]), ClockedComputer))
