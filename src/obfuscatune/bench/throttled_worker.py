"""Workers of a known speed, a test double of speed alone: real products, then a wait until their time is over.

Run as a process: `python -m obfuscatune.bench.throttled_worker COUNT GFLOPS`. All its workers share the machine, which
must be faster than all of them together. It writes their addresses as JSON, and ends when stdin is closed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from obfuscatune.process import settle_process

settle_process()

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch
from torch import Tensor

from obfuscatune.backend import Computer
from obfuscatune.bench.drift_worker import serving
from obfuscatune.bench.processes import Child


class ThrottledComputer(Computer):
    """Multiplies at `gflops` 10⁹ operations a second, one product at a time."""

    def __init__(self, gflops: float) -> None:
        super().__init__(torch.device("cpu"))
        self._seconds_each = 1 / (gflops * 1e9)
        self._alone = threading.Lock()

    def multiply(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
        """See `Computer`."""
        with self._alone:
            over = time.monotonic() + 2 * rows.shape[0] * matrix.numel() * self._seconds_each
            super().multiply(rows, matrix, out, transpose=transpose)
            time.sleep(max(0.0, over - time.monotonic()))


@contextmanager
def throttled_workers(count: int, gflops: float) -> Iterator[list[str]]:
    """The addresses of so many workers, in a process of their own.

    Raises:
        ConfigError: they did not start.
    """
    with Child(__name__, str(count), str(gflops)) as process:
        yield json.loads(process.answer())


def main(count: int, gflops: float) -> None:
    """Serve until stdin is closed."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        addresses = [stack.enter_context(serving(ThrottledComputer(gflops))) for _ in range(count)]
        print(json.dumps(addresses), flush=True)  # noqa: T201 - for whoever started this
        sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
