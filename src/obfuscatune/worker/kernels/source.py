"""The kernel: rows X (m, p) times W (p, q) for few rows.

    for each piece of columns, by whichever thread is free        its sums fit in a core's first cache
        for each 4 rows of W                                      read from memory once
            for each 4 rows of X                                  16 factors in registers
                for each vector of columns                        4 sums += 4 x 4 factors times 4 vectors of W

X comes packed: columns first, and rows of zeros up to a multiple of 4.
"""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from obfuscatune.jit.emit import I64, POINTER, Function, Shape

BLOCK = 4
"""Rows of X, and of W, that are multiplied at a time: their 16 factors, 4 sums and 4 vectors of W fit in registers."""


class Job(IntEnum):
    """Where each number stands in a job."""

    NEXT_PIECE = 0  # taken by threads, one after another
    NEXT_THREAD = 1  # likewise
    PIECES = 2
    PIECE = 3  # columns of a piece, in vectors
    ROWS = 4  # of X, with its rows of zeros
    REAL_ROWS = 5
    INNER = 6  # p
    COLUMNS = 7  # q
    X = 8  # addresses
    W = 9
    OUT = 10
    SCRATCH = 11
    SCRATCH_BYTES = 12  # of one thread
    LENGTH = 13


def build(shape: Shape, triple: str) -> ir.Module:
    """A module that exports `few_rows`."""
    module = ir.Module("obfuscatune-worker")
    module.triple = triple
    multiply = {height: _multiply(module, shape, height) for height in (BLOCK, 1)}
    f = Function(module, "few_rows", 1, shape, exported=True)
    b = f.builder
    (job,) = f.arguments

    def field(key: Job) -> ir.Value:
        return f.read(job, I64, 8 * key)

    def take(key: Job) -> ir.Value:
        place = b.inttoptr(b.add(job, I64(8 * key)), POINTER)
        return b.atomic_rmw("add", place, I64(1), "monotonic")

    vector_bytes, size = I64(shape.width * shape.itemsize), I64(shape.itemsize)
    sums = b.add(field(Job.SCRATCH), b.mul(take(Job.NEXT_THREAD), field(Job.SCRATCH_BYTES)))
    rows, inner, step = field(Job.ROWS), field(Job.INNER), b.mul(field(Job.COLUMNS), size)
    pieces, last = field(Job.PIECES), b.sub(step, vector_bytes)
    whole = b.mul(b.udiv(inner, I64(BLOCK)), I64(BLOCK))
    head, taken, end = (f.ir.append_basic_block(name) for name in ("take", "taken", "out_of_pieces"))
    b.branch(head)
    b.position_at_end(head)
    piece = take(Job.NEXT_PIECE)
    b.cbranch(b.icmp_signed("<", piece, pieces), taken, end)
    b.position_at_end(taken)
    start = b.mul(b.mul(piece, field(Job.PIECE)), vector_bytes)
    all_vectors = b.udiv(b.add(b.sub(step, start), b.sub(vector_bytes, I64(1))), vector_bytes)
    vectors = b.select(b.icmp_signed("<", all_vectors, field(Job.PIECE)), all_vectors, field(Job.PIECE))
    with f.loop(b.mul(rows, vectors)) as place:
        f.write(f.zero(), b.add(sums, b.mul(place, vector_bytes)))
    for height, begin, stop in ((BLOCK, I64(0), whole), (1, whole, inner)):
        with f.loop(stop, start=begin, step=height) as k:
            W = b.add(field(Job.W), b.mul(k, step))
            X = b.add(field(Job.X), b.mul(b.mul(k, rows), size))
            b.call(multiply[height], [X, rows, W, step, start, last, vectors, sums])
    with f.loop(field(Job.REAL_ROWS)) as row, f.loop(vectors) as vector:
        found = f.read(b.add(sums, b.mul(b.add(b.mul(row, vectors), vector), vector_bytes)), shape.vector)
        f.write(found, b.add(b.add(field(Job.OUT), b.mul(row, step)), _column(f, start, vector, last)))
    b.branch(head)
    b.position_at_end(end)
    b.ret_void()
    return module


def _multiply(module: ir.Module, shape: Shape, height: int) -> ir.Function:
    """multiply(X, rows, W, step, start, last, vectors, sums): sums (rows, vectors) += `height` rows of W, from the
    column `start` bytes on, times their factors in X. Meanwhile the next rows of W are brought into the cache."""
    f = Function(module, f"multiply_{height}", 8, shape)
    b = f.builder
    X, rows, W, step, start, last, vectors, sums = f.arguments
    vector_bytes, size = I64(shape.width * shape.itemsize), I64(shape.itemsize)
    beyond = b.mul(step, I64(height))
    with f.loop(rows, step=BLOCK) as row:
        factors = [
            [
                f.spread(
                    f.read(b.add(X, b.mul(b.add(b.mul(rows, I64(k)), row), size)), shape.number, shape.itemsize * i)
                )
                for i in range(BLOCK)
            ]
            for k in range(height)
        ]
        is_first = b.icmp_signed("==", row, I64(0))
        ahead = b.select(is_first, beyond, I64(0))  # what is in the cache already costs little to fetch again
        with f.loop(vectors) as vector:
            column = b.add(W, _column(f, start, vector, last))
            found = []
            for k in range(height):
                line = b.add(column, b.mul(step, I64(k)))
                f.fetch(b.add(line, ahead))
                found.append(f.read(line, shape.vector))
            for i in range(BLOCK):
                place = b.add(sums, b.mul(b.add(b.mul(b.add(row, I64(i)), vectors), vector), vector_bytes))
                total = b.fmul(factors[0][i], found[0])
                for k in range(1, height):
                    total = f.multiply_add(factors[k][i], found[k], total)
                f.write(b.fadd(f.read(place, shape.vector), total), place)  # fewer additions, less rounding
    b.ret_void()
    return f.ir


def _column(f: Function, start: ir.Value, vector: ir.Value, last: ir.Value) -> ir.Value:
    """Where a vector of columns begins in a row, in bytes: the last one overlaps the one before."""
    b = f.builder
    place = b.add(start, b.mul(vector, I64(f.shape.width * f.shape.itemsize)))
    return b.select(b.icmp_signed("<", place, last), place, last)
