"""R_in⁻¹ W R_out in W's own place, without memory for another W; and a matrix in another dtype in the same memory.

    W (p, q)  ->  R_in⁻¹ from the left  ->  R_out from the right  ->  W_star

Each side by the compiled kernels, where they apply; else tile by tile, each small enough for a core's cache and
worked on by one thread alone: columns from the left, rows from the right. Where W has 16 bits there is one float32
matrix in between. Either way the number of threads changes no bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from obfuscatune.enclave.transforms import Transform, widen

TILE_ELEMENTS = 1 << 18
"""Elements of a tile: 2 MiB in float64, which fit into a core's L2 cache."""
_CONVERTED = 1 << 20
"""Elements of a tile that is converted from one dtype to another."""
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


def place_bytes(shape: torch.Size | tuple[int, int], *dtypes: torch.dtype) -> int:
    """Bytes of memory that a matrix takes in the widest of these dtypes."""
    return math.prod(shape) * max(dtype.itemsize for dtype in dtypes)


def at_the_end(memory: Tensor, shape: tuple[int, int], dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """A matrix (p, q) at the end of the first bytes of `memory` that it takes in dtype `wide`: see `widened`."""
    stop = place_bytes(shape, wide, dtype)
    return memory[stop - place_bytes(shape, dtype) : stop].view(dtype).view(shape)


def widened(W: Tensor, memory: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W (p, q) in a wider dtype, in `memory`, at whose end it may lie: then W is overwritten.

    None is memory of its own. From the front on: where an element of the result is written, that of W has been read.
    """
    if W.dtype == dtype:
        return W
    if memory is None:
        return W.to(dtype)
    wide = memory[: place_bytes(W.shape, dtype)].view(dtype)
    _convert(W.view(-1), wide)
    return wide.view(W.shape)


def narrowed(W: Tensor, dtype: torch.dtype) -> Tensor:
    """W (p, q), contiguous, in a dtype of no more bytes, at the beginning of its own memory, which is overwritten."""
    if W.dtype == dtype:
        return W
    narrow = W.view(-1).view(torch.uint8)[: place_bytes(W.shape, dtype)].view(dtype)
    _convert(W.view(-1), narrow)
    return narrow.view(W.shape)


def sum_of_squares(W: Tensor) -> float:
    """Of all elements, in float64, without a copy of W in float64."""
    return sum(float(torch.linalg.vector_norm(tile, dtype=torch.float64)) ** 2 for tile in W.view(-1).split(_CONVERTED))


def _convert(source: Tensor, target: Tensor) -> None:
    """Tile by tile, each through the same memory: the two may overlap."""
    tile = torch.empty(min(_CONVERTED, source.numel()), dtype=source.dtype)
    for start in range(0, source.numel(), _CONVERTED):
        stop = min(start + _CONVERTED, source.numel())
        target[start:stop] = tile[: stop - start].copy_(source[start:stop])


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
