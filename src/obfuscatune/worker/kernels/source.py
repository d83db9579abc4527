"""The kernel: rows X (m, p) times W (p, q) for few rows.

    for each piece of columns, by whichever thread is free: its sums (m, columns) fit in the second cache
        for each `CHUNK` rows of W                   read from memory once, from left to right
            for each strip of columns, a few vectors wide
                for each block of up to `height` rows of X
                    sums in registers  +=  X's numbers, one after another, times vectors of W
                    these are added to the sums of the chunks before

The last strip of the matrix overlaps the one before; its columns are computed twice, to the same bits.
"""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from obfuscatune.jit.emit import I64, Function, Shape

CHUNK = 16
"""Rows of W that are read side by side; the next strip of as many is fetched meanwhile."""


AHEAD = 3
"""Strips from the one that is multiplied by to the one that is fetched."""


class Job(IntEnum):
    """Where each number stands in a job."""

    NEXT_PIECE = 0  # taken by threads, one after another
    NEXT_THREAD = 1  # likewise
    STRIPS = 2
    PIECE = 3  # strips that a thread takes at a time
    ROWS = 4  # m
    INNER = 5  # p
    COLUMNS = 6  # q
    X = 7  # addresses
    W = 8
    OUT = 9
    SCRATCH = 10
    SCRATCH_BYTES = 11  # of one thread: the sums of a piece
    LENGTH = 12


def build(shape: Shape, triple: str) -> ir.Module:
    """A module that exports `few_rows`."""
    module = ir.Module("obfuscatune-worker")
    module.triple = triple
    blocks = [_block(module, shape, height) for height in range(1, shape.height + 1)]
    chunk = _chunk(module, shape, blocks)
    f = Function(module, "few_rows", 1, shape, exported=True)
    b = f.builder
    row_bytes, m = I64(shape.row_bytes), f.field(Job.ROWS)
    sums = b.add(f.field(Job.SCRATCH), b.mul(f.take(Job.NEXT_THREAD, I64(1)), f.field(Job.SCRATCH_BYTES)))
    step = b.mul(f.field(Job.COLUMNS), I64(shape.itemsize))
    last = b.sub(step, row_bytes)
    x_step = b.mul(f.field(Job.INNER), I64(shape.itemsize))
    with f.shares(Job.NEXT_PIECE, f.field(Job.PIECE), f.field(Job.STRIPS)) as (first, stop):
        with f.loop(b.mul(m, b.sub(stop, first))) as place:
            f.write_row([f.zero()] * shape.vectors, b.add(sums, b.mul(place, row_bytes)))
        with f.loop(f.field(Job.INNER), step=CHUNK) as k:
            rows = f.at_most(b.sub(f.field(Job.INNER), k), I64(CHUNK))
            X = b.add(f.field(Job.X), b.mul(k, I64(shape.itemsize)))
            W = b.add(f.field(Job.W), b.mul(k, step))
            b.call(chunk, [X, x_step, m, W, step, rows, first, stop, last, sums])
        with f.loop(stop, start=first) as strip, f.loop(m) as row:
            place = b.add(b.mul(b.sub(strip, first), m), row)
            found = f.read_row(b.add(sums, b.mul(place, row_bytes)))
            column = f.at_most(b.mul(strip, row_bytes), last)
            f.write_row(found, b.add(b.add(f.field(Job.OUT), b.mul(row, step)), column))
    b.ret_void()
    return module


def _chunk(module: ir.Module, shape: Shape, blocks: list[ir.Function]) -> ir.Function:
    """chunk(X, x_step, m, W, step, rows, first, stop, last, sums): the sums of the strips from `first` to `stop` gain
    X (m, rows) times `rows` rows of W, which are `step` bytes apart; no strip begins behind the byte `last`.

    The sums lie strip by strip, (m, lanes) each.
    """
    f = Function(module, "chunk", 10, shape)
    b = f.builder
    X, x_step, m, W, step, rows, first, stop, last, sums = f.arguments
    row_bytes = I64(shape.row_bytes)
    count = b.udiv(b.add(m, I64(shape.height - 1)), I64(shape.height))
    low, taller = b.udiv(m, count), b.urem(m, count)
    with f.loop(stop, start=first) as strip:
        column = b.add(W, f.at_most(b.mul(strip, row_bytes), last))
        after = b.add(strip, I64(AHEAD))
        is_beyond = b.icmp_signed(">=", after, stop)
        after = b.select(is_beyond, f.at_most(b.add(b.sub(after, stop), first), b.sub(stop, I64(1))), after)
        coming = b.add(W, f.at_most(b.mul(after, row_bytes), last))
        coming = b.add(coming, b.select(is_beyond, b.mul(step, I64(CHUNK)), I64(0)))
        total = b.add(sums, b.mul(b.mul(b.sub(strip, first), m), row_bytes))
        row = f.local(I64, I64(0))
        with f.loop(count) as block:
            height = b.add(low, b.zext(b.icmp_signed("<", block, taller), I64))
            here = b.load(row, typ=I64)
            x = b.add(X, b.mul(here, x_step))
            fetched = b.select(b.icmp_signed("==", block, I64(0)), coming, column)  # the first fetches for all
            arguments = [x, x_step, column, step, rows, b.add(total, b.mul(here, row_bytes)), fetched]
            f.call_by_number(blocks, height, arguments)
            b.store(b.add(here, height), row)
    b.ret_void()
    return f.ir


def _block(module: ir.Module, shape: Shape, height: int) -> ir.Function:
    """block_M(x, x_step, W, step, rows, sums, coming): a strip of sums (M, lanes) gains x (M, rows) times rows of W.

    Meanwhile the strip at `coming` is fetched.
    """
    f = Function(module, f"block_{height}", 7, shape)
    b = f.builder
    x, x_step, W, step, rows, sums, coming = f.arguments
    places = [b.add(sums, I64(i * shape.row_bytes)) for i in range(height)]
    totals = [[f.local(shape.vector, f.zero()) for _ in range(shape.vectors)] for _ in range(height)]
    x_rows = [b.add(x, b.mul(x_step, I64(i))) for i in range(height)]
    with f.loop(rows) as k:
        line = b.mul(k, step)
        for index in range(shape.lines):
            f.fetch(b.add(b.add(coming, line), I64(64 * index)), level=2)
        vectors = f.read_row(b.add(W, line))
        for x_row, row_totals in zip(x_rows, totals, strict=True):
            factor = f.spread(f.read(b.add(x_row, b.mul(k, I64(shape.itemsize))), shape.number))
            for vector, total in zip(vectors, row_totals, strict=True):
                b.store(f.multiply_add(factor, vector, b.load(total, typ=shape.vector)), total)
    for place, row_totals in zip(places, totals, strict=True):
        before = f.read_row(place)
        after = [b.fadd(old, b.load(total, typ=shape.vector)) for old, total in zip(before, row_totals, strict=True)]
        f.write_row(after, place)
    b.ret_void()
    return f.ir
