"""The limits of a machine, measured on the spot: how fast a product can be, and how fast memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIDE = 1536
"""Of the square matrices that are multiplied: large enough for a product to be at its best."""
LARGE_BYTES = 256 << 20
"""Of what is copied and summed."""
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """10⁹ operations and 10⁹ bytes a second, with the threads that torch has."""

    gflops: float
    """Floating-point operations of a product of two float32 matrices."""
    copied_gbytes: float
    """Bytes read and written by a copy."""
    read_gbytes: float
    """Bytes read by a sum."""

    def least_seconds(self, flops: float, nbytes: float = 0.0) -> float:
        """The least that products of so many operations can take, if they must also read so many bytes once."""
        return max(flops / self.gflops, nbytes / max(self.read_gbytes, self.copied_gbytes)) / 1e9

    def passing_seconds(self, nbytes: float) -> float:
        """The least that so many bytes, read and written together, can take."""
        return nbytes / self.copied_gbytes / 1e9


def measure_limits(*, side: int = SIDE, large_bytes: int = LARGE_BYTES) -> Limits:
    """About a second, with the sizes as they are."""
    with torch.inference_mode():
        a, large = torch.randn(side, side), torch.ones(large_bytes // 4)
        out, copy = torch.empty_like(a), torch.empty_like(large)
        product = median_seconds(lambda: torch.mm(a, a, out=out))
        copying = median_seconds(lambda: copy.copy_(large))
        reading = median_seconds(lambda: large.sum())
    return Limits(2 * side**3 / product / 1e9, 2 * large.nbytes / copying / 1e9, large.nbytes / reading / 1e9)


def median_seconds(work: Callable[[], object], *, repeats: int = REPEATS, least_seconds: float = 0.0) -> float:
    """Of one call, after one that is not counted: `repeats` of them, and as many as `least_seconds` hold."""
    work()
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < least_seconds:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
