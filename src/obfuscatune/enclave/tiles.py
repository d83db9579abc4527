"""R_in⁻¹ W R_out in W's own place, without memory for another W.

    W (p, q)  ->  R_in⁻¹ from the left  ->  R_out from the right  ->  W_star

Each side by the compiled kernels, where they apply; else tile by tile, each small enough for a core's cache and
worked on by one thread alone: columns from the left, rows from the right. Where W has 16 bits there is one float32
matrix in between. Either way the number of threads changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from obfuscatune.enclave.transforms import Transform, widen

TILE_ELEMENTS = 1 << 18
"""Elements of a tile: 2 MiB in float64, which fit into a core's L2 cache."""
_THREADS = 16
"""Columns of a tile are a multiple of this: 64 bytes of float32, one cache line."""


def transform_in_place(W: Tensor, R_in: Transform, R_out: Transform, *, wide: torch.dtype = torch.float64) -> Tensor:
    """W becomes R_in⁻¹ W R_out, and is returned.

    Args:
        W: (p, q), contiguous, on the CPU, in any dtype that crosses the wire. It is overwritten.
        R_in, R_out: of dimension p and q. One that is 1 is passed over.
        wide: dtype of a tile while it is worked on, W's own where that is wider. Each of both sides rounds once,
            to W's dtype or, where that has 16 bits, to float32 and at last to W's.
    """
    W_star = widen(W)
    wide = torch.promote_types(wide, W_star.dtype)
    with torch.no_grad():
        if not R_in.left_in_place(W_star, wide=wide):
            _by_columns(W_star, lambda tile: R_in.weight_left(tile, wide=wide))
        if not R_out.right_in_place(W_star, wide=wide):
            _by_rows(W_star, lambda tile: R_out.weight_right(tile, wide=wide))
        return W if W_star is W else W.copy_(W_star)


def _by_columns(W: Tensor, act: Callable[[Tensor], Tensor]) -> None:
    p, q = W.shape

    def work(start: int, stop: int) -> None:
        W[:, start:stop] = act(W[:, start:stop])

    _all(work, q, max(TILE_ELEMENTS // p // _THREADS, 1) * _THREADS)


def _by_rows(W: Tensor, act: Callable[[Tensor], Tensor]) -> None:
    p, q = W.shape

    def work(start: int, stop: int) -> None:
        W[start:stop] = act(W[start:stop])

    _all(work, p, max(TILE_ELEMENTS // q, 1))


def _all(work: Callable[[int, int], None], size: int, width: int) -> None:
    """`work` on every tile of that width; raises what one of them raised."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "obfuscatune-tile", _one_core) as pool:
            for done in [pool.submit(work, start, stop) for start, stop in _tiles(size, width)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # of threads to come: the pool's have set it to one


def _tiles(size: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _one_core() -> None:
    """Products inside a tile are not split further, and no gradient is recorded: both are told to each thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
