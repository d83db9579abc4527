"""What W makes of a few vectors, both ways, and its norm, in one pass: W R, Wᵀ L and |W| for R (q, 8) and L (p, 8).

torch takes three passes, and its products by so narrow a factor leave most of a processor idle.

    for each strip of columns            its part of R and of Wᵀ L stays in the first cache
        for each two rows of W           their sums with R in registers
            for each vector of the strip   16 products with R, 16 with the rows' numbers of L
"""

from __future__ import annotations

import ctypes
import functools
import math
from enum import IntEnum

import torch
from llvmlite import ir
from torch import Tensor

from obfuscatune.jit import team
from obfuscatune.jit.emit import I64, Function, Shape
from obfuscatune.jit.engine import Engine, compiled_once, host_shape

VECTORS = 8
"""Columns of R and of L."""
ROWS = 2
"""Of W, at a time: with `VECTORS`, as many sums as half of the registers hold."""
STRIP_BYTES = 1 << 10
"""Of a row of W, at a time: those of R and of Wᵀ L take 16 KiB of the first cache."""
CHUNK = 512
"""Rows whose products are summed one after another: what the sums err by grows with their number."""


class Job(IntEnum):
    """Where each number stands in a job."""

    W = 0  # addresses
    W_STEP = 1  # bytes from row to row
    ROWS = 2  # a multiple of `ROWS`
    COLUMNS = 3  # in vectors of the processor
    STRIP = 4  # likewise: those taken at a time
    R_T = 5  # (VECTORS, q)
    STEP = 6  # bytes from row to row of R_T and L_W
    L = 7  # (p, VECTORS)
    PARTS = 8  # (p, VECTORS, width): sums of W R, lane by lane, which are added to
    L_W = 9  # (VECTORS, q): Lᵀ W, likewise
    SQUARES = 10  # (strips, width): sums of squares
    LENGTH = 11


def images(W: Tensor, R: Tensor, L: Tensor, shape: Shape | None = None) -> tuple[Tensor, Tensor, float]:
    """W R (p, 8), Wᵀ L (q, 8) and the root of the sum of all squares; on this thread.

    Args:
        W: (p, q), contiguous, float32 or float64, on the CPU.
        R: (q, 8) in W's dtype.
        L: (p, 8), likewise.
        shape: other registers than this processor's; the result is the same, to rounding.
    """
    shape = shape or host_shape(W.itemsize)
    R, L = R.contiguous(), L.contiguous()
    R_T, W_R, L_W, squares = R.T.contiguous(), W.new_empty(W.shape[0], VECTORS), W.new_zeros(VECTORS, W.shape[1]), 0.0
    for start in range(0, W.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        more, found = _of_chunk(W[rows], R, R_T, L[rows], W_R[rows], shape)
        L_W += more
        squares += found
    return W_R, L_W.T.contiguous(), math.sqrt(squares)


def _of_chunk(W: Tensor, R: Tensor, R_T: Tensor, L: Tensor, W_R: Tensor, shape: Shape) -> tuple[Tensor, float]:
    """W_R becomes W R; Lᵀ W (8, q), and the sum of all squares of W."""
    kernel = _compiled(shape).address("images")
    (p, q), width = W.shape, shape.width
    rows, columns = p // ROWS * ROWS, q // width * width
    strip = max(STRIP_BYTES // (width * shape.itemsize), 1)
    parts = W.new_zeros(p, VECTORS, width)
    squares = W.new_zeros(-(-columns // (width * strip)), width)
    L_W = W.new_zeros(VECTORS, q)
    job = (ctypes.c_int64 * Job.LENGTH)()
    for key, value in {
        Job.W: W.data_ptr(),
        Job.W_STEP: q * W.itemsize,
        Job.ROWS: rows,
        Job.COLUMNS: columns // width,
        Job.STRIP: strip,
        Job.R_T: R_T.data_ptr(),
        Job.STEP: q * W.itemsize,
        Job.L: L.data_ptr(),
        Job.PARTS: parts.data_ptr(),
        Job.L_W: L_W.data_ptr(),
        Job.SQUARES: squares.data_ptr(),
    }.items():
        job[key] = value
    team.run(kernel, ctypes.addressof(job), 1)
    beside, below = W[:rows, columns:], W[rows:]  # what fills no vector, and no pair of rows
    torch.sum(parts, dim=2, out=W_R)
    W_R[:rows] += beside @ R[columns:]
    W_R[rows:] = below @ R
    L_W[:, columns:] = L[:rows].T @ beside
    L_W += L[rows:].T @ below
    return L_W, sum(float(part.double().square().sum()) for part in (beside, below)) + float(squares.double().sum())


@compiled_once
def _compiled(shape: Shape) -> Engine:
    return Engine(functools.partial(build, shape))


def build(shape: Shape, triple: str) -> ir.Module:
    """A module that exports `images`."""
    module = ir.Module("obfuscatune_images")
    module.triple = triple
    f = Function(module, "images", 1, shape, exported=True)
    b = f.builder
    vector_bytes = I64(shape.width * shape.itemsize)
    step, w_step, count = f.field(Job.STEP), f.field(Job.W_STEP), f.field(Job.COLUMNS)
    R_T = [b.add(f.field(Job.R_T), b.mul(step, I64(v))) for v in range(VECTORS)]
    L_W = [b.add(f.field(Job.L_W), b.mul(step, I64(v))) for v in range(VECTORS)]
    strip = f.field(Job.STRIP)
    strips = b.udiv(b.add(count, b.sub(strip, I64(1))), strip)
    with f.loop(strips) as number:
        start = b.mul(number, strip)
        stop = f.at_most(b.add(start, strip), count)
        squares = f.local(shape.vector, f.zero())
        b.store(f.zero(), squares)
        with f.loop(f.field(Job.ROWS), step=ROWS) as row:
            here = [b.add(f.field(Job.W), b.mul(b.add(row, I64(m)), w_step)) for m in range(ROWS)]
            first = b.add(f.field(Job.L), b.mul(row, I64(VECTORS * shape.itemsize)))
            factors = [
                [f.spread(f.read(first, shape.number, (m * VECTORS + v) * shape.itemsize)) for v in range(VECTORS)]
                for m in range(ROWS)
            ]
            parts = b.add(f.field(Job.PARTS), b.mul(row, b.mul(vector_bytes, I64(VECTORS))))
            offset = shape.width * shape.itemsize
            sums = [[f.local(shape.vector, f.zero()) for _ in range(VECTORS)] for _ in range(ROWS)]
            for m in range(ROWS):
                for v in range(VECTORS):
                    b.store(f.read(parts, shape.vector, (m * VECTORS + v) * offset), sums[m][v])
            with f.loop(stop, start=start) as k:
                shift = b.mul(k, vector_bytes)
                w = [f.read(b.add(place, shift), shape.vector) for place in here]
                for place in here:
                    f.fetch(b.add(b.add(place, shift), b.mul(w_step, I64(ROWS))))
                for m in range(ROWS):
                    b.store(f.multiply_add(w[m], w[m], b.load(squares, typ=shape.vector)), squares)
                for v in range(VECTORS):
                    r = f.read(b.add(R_T[v], shift), shape.vector)
                    total = f.read(b.add(L_W[v], shift), shape.vector)
                    for m in range(ROWS):
                        b.store(f.multiply_add(r, w[m], b.load(sums[m][v], typ=shape.vector)), sums[m][v])
                        total = f.multiply_add(factors[m][v], w[m], total)
                    f.write(total, b.add(L_W[v], shift))
            for m in range(ROWS):
                for v in range(VECTORS):
                    f.write(b.load(sums[m][v], typ=shape.vector), parts, (m * VECTORS + v) * offset)
        place = b.add(f.field(Job.SQUARES), b.mul(number, vector_bytes))
        f.write(b.load(squares, typ=shape.vector), place)
    b.ret_void()
    return module
