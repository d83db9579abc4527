"""The kernel that watches a slot: takes requests from it and multiplies, until none comes for a while.

    number posted != number seen?  ->  read the request, once  ->  check it  ->  few_rows  ->  number answered

Whoever posts can write anything there at any time: what was read is checked, and it is that copy which is used.
"""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from obfuscatune.jit.emit import I32, I64, POINTER, Function, Shape
from obfuscatune.wire.limits import MAX_SLOT_ROWS
from obfuscatune.wire.shared_memory import ALIGNMENT
from obfuscatune.wire.slot import Word
from obfuscatune.worker.kernels.source import Job


class Entry(IntEnum):
    """Words of a matrix in the table."""

    W = 0  # address
    INNER = 1  # p
    COLUMNS = 2  # q
    STRIPS = 3
    PIECE = 4
    THREADS = 5
    LENGTH = 6


class Watch(IntEnum):
    """Where each number stands in this job."""

    SLOT = 0  # address
    SEEN = 1  # number of the request that was answered last
    TURNS = 2  # of waiting, until the watch ends
    REQUESTS = 3  # to be answered, at most
    TABLE = 4  # address
    MATRICES = 5
    MEMORY = 6  # address of the shared memory
    MEMORY_BYTES = 7
    FEW = 8  # address of a job for `few_rows`, its scratch memory laid down
    PARALLEL = 9  # address of GOMP_parallel
    FEW_ROWS = 10  # address of `few_rows`
    END = 11  # why it ended
    SERVED = 12  # products
    TICKS = 13  # of the processor's clock, while it multiplied
    OPERATIONS = 14  # multiplications and additions
    ELEMENTS = 15  # read and written
    WHOLE = 16  # ticks of the whole watch
    LENGTH = 17


class End(IntEnum):
    """Why a watch ended."""

    IDLE = 0
    CALLED = 1  # the enclave wants the worker elsewhere
    ENOUGH = 2
    BROKEN = 3  # a request that no enclave may post


def add_watch(module: ir.Module, shape: Shape) -> None:
    """Add `watch`, exported, beside `few_rows`."""
    f = Function(module, "watch", 1, shape, exported=True)
    b = f.builder
    slot = f.field(Watch.SLOT)
    job = f.arguments[0]
    head, posted, empty, waiting, leaving, broken, serve, done = (
        f.ir.append_basic_block(name)
        for name in ("head", "posted", "empty", "waiting", "leaving", "broken", "serve", "done")
    )
    turns = f.local(I64, f.field(Watch.TURNS))
    seen = f.local(I64, f.field(Watch.SEEN))
    end = f.local(I64, I64(End.IDLE))
    began = f.ticks()
    f.store_shared(I64(1), slot, 8 * Word.WATCHED)
    b.branch(head)

    b.position_at_end(head)
    number = f.load_shared(slot, 8 * Word.POSTED)
    b.cbranch(b.icmp_unsigned("!=", number, b.load(seen, typ=I64)), posted, empty)

    b.position_at_end(empty)
    called = b.icmp_unsigned("!=", f.load_shared(slot, 8 * Word.LEAVE), I64(0))
    left = b.sub(b.load(turns, typ=I64), I64(1))
    b.store(left, turns)
    b.store(b.select(called, I64(End.CALLED), I64(End.IDLE)), end)
    b.cbranch(b.or_(called, b.icmp_signed("<=", left, I64(0))), leaving, waiting)

    b.position_at_end(waiting)
    f.rest()
    b.branch(head)

    b.position_at_end(leaving)  # whoever posts now, and sees that nobody watches, asks for a watch
    f.store_shared(I64(0), slot, 8 * Word.WATCHED)
    again = b.icmp_unsigned("!=", f.load_shared(slot, 8 * Word.POSTED), b.load(seen, typ=I64))
    resume = f.ir.append_basic_block("resume")
    b.cbranch(b.and_(again, b.icmp_unsigned("==", b.load(end, typ=I64), I64(End.IDLE))), resume, done)
    b.position_at_end(resume)
    f.store_shared(I64(1), slot, 8 * Word.WATCHED)
    b.branch(head)

    b.position_at_end(posted)
    matrix, rows, source, target = (f.load_shared(slot, 8 * w) for w in (Word.MATRIX, Word.ROWS, Word.FROM, Word.TO))
    known = b.icmp_unsigned("<", matrix, f.field(Watch.MATRICES))
    some = b.icmp_unsigned("<", b.sub(rows, I64(1)), I64(MAX_SLOT_ROWS))
    aligned = b.icmp_unsigned("==", b.and_(b.or_(source, target), I64(ALIGNMENT - 1)), I64(0))
    in_table = f.ir.append_basic_block("in_table")
    b.cbranch(b.and_(known, b.and_(some, aligned)), in_table, broken)

    b.position_at_end(in_table)
    entry = b.add(f.field(Watch.TABLE), b.mul(matrix, I64(8 * Entry.LENGTH)))
    inner, columns = f.read(entry, I64, 8 * Entry.INNER), f.read(entry, I64, 8 * Entry.COLUMNS)
    size = f.field(Watch.MEMORY_BYTES)
    fits = []
    for place, width in ((source, inner), (target, columns)):
        taken = b.mul(b.mul(rows, width), I64(shape.itemsize))
        begins = b.icmp_unsigned("<=", place, size)
        fits.append(b.and_(begins, b.icmp_unsigned("<=", taken, b.sub(size, place))))
    b.cbranch(b.and_(*fits), serve, broken)

    b.position_at_end(broken)
    b.store(I64(End.BROKEN), end)
    f.store_shared(I64(0), slot, 8 * Word.WATCHED)
    b.branch(done)

    b.position_at_end(serve)
    few, memory = f.field(Watch.FEW), f.field(Watch.MEMORY)
    given = {
        Job.NEXT_PIECE: I64(0),
        Job.NEXT_THREAD: I64(0),
        Job.ROWS: rows,
        Job.INNER: inner,
        Job.COLUMNS: columns,
        Job.STRIPS: f.read(entry, I64, 8 * Entry.STRIPS),
        Job.PIECE: f.read(entry, I64, 8 * Entry.PIECE),
        Job.W: f.read(entry, I64, 8 * Entry.W),
        Job.X: b.add(memory, source),
        Job.OUT: b.add(memory, target),
    }
    for key, value in given.items():
        f.write(value, few, 8 * key)
    started = f.ticks()
    threads = f.read(entry, I64, 8 * Entry.THREADS)
    with b.if_else(b.icmp_unsigned("==", threads, I64(1))) as (alone, together):
        with alone:
            b.call(module.get_global("few_rows"), [few])
        with together:
            kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I32, I32])
            parallel = b.inttoptr(f.field(Watch.PARALLEL), kind.as_pointer())
            pointers = [b.inttoptr(address, POINTER) for address in (f.field(Watch.FEW_ROWS), few)]
            b.call(parallel, [*pointers, b.trunc(threads, I32), I32(0)])
    totals = {
        Watch.SERVED: I64(1),
        Watch.TICKS: b.sub(f.ticks(), started),
        Watch.OPERATIONS: b.mul(I64(2), b.mul(rows, b.mul(inner, columns))),
        Watch.ELEMENTS: b.add(b.mul(inner, columns), b.mul(rows, b.add(inner, columns))),
    }
    for total, added in totals.items():
        f.write(b.add(f.field(total), added), job, 8 * total)
    f.store_shared(number, slot, 8 * Word.ANSWERED)
    b.store(number, seen)
    b.store(f.field(Watch.TURNS), turns)
    b.store(I64(End.ENOUGH), end)
    b.cbranch(b.icmp_unsigned("<", f.field(Watch.SERVED), f.field(Watch.REQUESTS)), head, leaving)

    b.position_at_end(done)
    f.write(b.sub(f.ticks(), began), job, 8 * Watch.WHOLE)
    f.write(b.load(seen, typ=I64), job, 8 * Watch.SEEN)
    f.write(b.load(end, typ=I64), job, 8 * Watch.END)
    b.ret_void()
