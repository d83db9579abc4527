"""A worker's own program that goes bad after so many products.

run as:  python -m tests.enclave.fleet.bad_worker lie|slow PRODUCTS --listen tcp:host:port ...
"""

from __future__ import annotations

import sys
import time

from obfuscatune.process import settle_process

settle_process()

# ruff: noqa: E402 - torch reads the environment when it is imported
import torch

from obfuscatune.backend import Computer
from obfuscatune.worker.options import parse_arguments
from obfuscatune.worker.server import run

SLOW_SECONDS = 0.4
"""Added to each product."""


class BadComputer(Computer):
    """Honest and fast for `good` products; from then on its products are wrong, or late."""

    way = "lie"
    good = 0

    def multiply(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool) -> None:
        """See `Computer`."""
        super().multiply(rows, matrix, out, transpose=transpose)
        type(self).good -= 1
        if self.good >= 0:
            return
        if self.way == "slow":
            time.sleep(SLOW_SECONDS)
        else:
            out[0, 0] += 1e-2 * (1 + out.abs().max())


if __name__ == "__main__":
    BadComputer.way, BadComputer.good = sys.argv[1], int(sys.argv[2])
    sys.exit(run(parse_arguments(sys.argv[3:]), BadComputer))
