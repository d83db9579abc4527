"""R_in⁻¹ W R_out in W's own place: panel by panel, each small enough for a core's cache.

    W (p, q)  ->  column panels (p, c): R_in⁻¹ from the left  ->  row panels (r, q): R_out from the right  ->  W_star

Beside W there is one panel for each thread, and, where W has 16 bits, one float32 matrix in between. Each panel is
worked on by one thread alone, so the number of threads changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from obfuscatune.enclave.transforms import Transform
from obfuscatune.enclave.transforms.identity import UnsafeIdentity

PANEL_ELEMENTS = 1 << 18
"""Of a panel: 2 MiB in float64, what a core's second cache holds."""
_LANES = 16
"""Columns of a panel are a multiple of it: 64 bytes of float32, a line of the cache."""
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def transform_in_place(W: Tensor, R_in: Transform, R_out: Transform, *, wide: torch.dtype = torch.float64) -> Tensor:
    """W becomes R_in⁻¹ W R_out, and is returned.

    Args:
        W: (p, q), contiguous, on the CPU, in any dtype that crosses the wire. It is overwritten.
        R_in, R_out: of dimension p and q. One that is 1 is passed over.
        wide: dtype of a panel while it is worked on, W's own where that is wider. Each of both sides rounds once,
            to W's dtype or, where that has 16 bits, to float32 and at last to W's.
    """
    p, q = W.shape
    wide = torch.promote_types(wide, W.dtype)
    between = torch.empty(p, q) if W.dtype in _SIXTEEN_BITS else W

    def left(start: int, stop: int) -> None:
        between[:, start:stop] = R_in.weight_left(W[:, start:stop].to(between.dtype), wide=wide)

    def right(start: int, stop: int) -> None:
        W[start:stop] = R_out.weight_right(between[start:stop], wide=wide)

    columns = max(PANEL_ELEMENTS // p // _LANES, 1) * _LANES
    rows = max(PANEL_ELEMENTS // q, 1)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "obfuscatune-panel", _one_core) as pool:
            if between is not W or not isinstance(R_in, UnsafeIdentity):
                _all(pool, left, q, columns)
            if between is not W or not isinstance(R_out, UnsafeIdentity):
                _all(pool, right, p, rows)
    finally:
        torch.set_num_threads(threads)  # of threads to come: the pool's have set it to one
    return W


def _all(pool: ThreadPoolExecutor, work: Callable[[int, int], None], size: int, width: int) -> None:
    """`work` on every panel of that width; raises what one of them raised."""
    for done in [pool.submit(work, start, stop) for start, stop in _panels(size, width)]:
        done.result()


def _panels(size: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _one_core() -> None:
    """Products inside a panel are not split further, and no gradient is recorded: both are told to each thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
