"""X W for many rows X, in parts of W's columns that threads take one after another (docs/adr/0013).

BLAS cuts a product into as many equal parts as there are threads and waits for the last of them. A worker shares its
cores with the enclave, which computes on while it waits: then one thread has half a core, and the other waits for it.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum

import torch
from llvmlite import ir
from torch import Tensor

from obfuscatune.jit import team
from obfuscatune.jit.emit import I64, POINTER, Function
from obfuscatune.jit.engine import Engine, compiled_once, host_shape
from obfuscatune.worker.kernels import blas

PARTS_PER_THREAD = 4
"""At least, where they do not become too narrow: the last one to end is waited for."""
NARROWEST, WIDEST = 64, 192
"""Columns of a part. BLAS lays the rows out anew for each: narrower ones take longer, and wider ones win nothing."""
_STEP = 64


class Job(IntEnum):
    """Where each number stands in a job. What BLAS takes, it takes by address."""

    NEXT_COLUMN = 0  # taken by threads, one part after another
    PART = 1  # columns that a thread takes at a time
    COLUMNS = 2
    W, W_STEP = 3, 4  # address; bytes from column to column of the product
    OUT = 5  # address
    X = 6  # address
    GEMM = 7  # address of BLAS's product
    W_TURNED, AS_IT_IS = 8, 9  # letters
    ROWS = 10
    INNER = 11
    W_ROW, X_ROW, OUT_ROW = 12, 13, 14  # numbers from row to row
    ONE, ZERO = 15, 16  # as the product's numbers
    LENGTH = 17


def multiply(rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
    """out = rows @ matrix, or rows @ matrixᵀ, on torch's threads.

    Args:
        rows: (m, p), or (m, q) when `transpose`; contiguous, float32 or float64.
        matrix: (p, q), contiguous, of the same dtype.
        out: (m, q), or (m, p) when `transpose`; contiguous, of the same dtype.
        transpose: multiply by the transpose.
    """
    m, inner = rows.shape
    columns, itemsize, w_row = out.shape[1], rows.itemsize, matrix.shape[1]
    threads = torch.get_num_threads()
    fields = {
        Job.PART: part_width(columns, threads),
        Job.COLUMNS: columns,
        Job.W: matrix.data_ptr(),
        Job.W_STEP: itemsize * (w_row if transpose else 1),
        Job.OUT: out.data_ptr(),
        Job.X: rows.data_ptr(),
        Job.GEMM: blas.gemm(itemsize),
        Job.W_TURNED: ord("T" if transpose else "N"),  # BLAS takes columns for rows: this is outᵀ = Wᵀ Xᵀ
        Job.AS_IT_IS: ord("N"),
        Job.ROWS: m,
        Job.INNER: inner,
        Job.W_ROW: w_row,
        Job.X_ROW: inner,
        Job.OUT_ROW: columns,
        Job.ONE: int.from_bytes(struct.pack("<f" if itemsize == 4 else "<d", 1.0), "little"),
    }
    job = (ctypes.c_int64 * Job.LENGTH)()
    for key, value in fields.items():
        job[key] = value
    team.run(_engine(itemsize).address("multiply_parts"), ctypes.addressof(job), threads)


def part_width(columns: int, threads: int) -> int:
    """Of the parts of a product that is so wide."""
    wanted = -(-columns // (PARTS_PER_THREAD * threads))
    return min(max(-(-wanted // _STEP) * _STEP, NARROWEST), WIDEST)


@compiled_once
def _engine(itemsize: int) -> Engine:
    return Engine(lambda triple: _build(itemsize, triple))


def _build(itemsize: int, triple: str) -> ir.Module:
    """A module that exports `multiply_parts`, which hands each part to BLAS's product, on the thread that took it."""
    module = ir.Module("obfuscatune-parts")
    module.triple = triple
    f = Function(module, "multiply_parts", 1, host_shape(itemsize), exported=True)
    b, job = f.builder, f.arguments[0]
    gemm = b.inttoptr(f.field(Job.GEMM), ir.FunctionType(ir.VoidType(), [POINTER] * 13).as_pointer())
    width = f.local(I64, I64(0))

    def place(key: Job) -> ir.Value:
        return b.inttoptr(b.add(job, I64(8 * key)), POINTER)

    def address(key: Job, bytes_beyond: ir.Value | None = None) -> ir.Value:
        start = f.field(key)
        return b.inttoptr(start if bytes_beyond is None else b.add(start, bytes_beyond), POINTER)

    with f.shares(Job.NEXT_COLUMN, f.field(Job.PART), f.field(Job.COLUMNS)) as (start, stop):
        b.store(b.sub(stop, start), width)
        W = address(Job.W, b.mul(start, f.field(Job.W_STEP)))
        out = address(Job.OUT, b.mul(start, I64(itemsize)))
        sizes = [b.bitcast(width, POINTER), place(Job.ROWS), place(Job.INNER)]
        factors = [W, place(Job.W_ROW), address(Job.X), place(Job.X_ROW)]
        result = [place(Job.ZERO), out, place(Job.OUT_ROW)]
        b.call(gemm, [place(Job.W_TURNED), place(Job.AS_IT_IS), *sizes, place(Job.ONE), *factors, *result])
    b.ret_void()
    return module
