"""The kernels themselves, as LLVM IR. All work on panels: rows of `lanes` numbers, a core's cache full of them.

    multiply_M   (M, k) times (k, lanes), sums in registers                       the inner loop of everything
    times        Q (s, s) times s rows of a panel, gathered and scattered by tables of offsets
    kronecker    (Q_a ⊗ Q_b) times a·b rows
    mix_rows     for each panel of columns of x: kronecker, straight from x's rows to the result's
    rotate       for each panel of rows of x: transpose into cache, kronecker (twice for two grids), transpose out

Left factors lie packed in blocks: see `packing`. Tables hold byte offsets as int64. A kernel that is exported takes the
address of a list of int64, its job, and is run by several threads at once, each of which takes the next panel from
the job's counter until none is left. Every thread has a piece of scratch memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from llvmlite import ir

from obfuscatune.enclave.kernels.few import add_few
from obfuscatune.jit.emit import CACHE_LINE, I64, Function, Shape


class Job(IntEnum):
    """Where each number stands in a job."""

    NEXT_PANEL = 0  # taken by threads, one after another
    NEXT_THREAD = 1  # likewise
    PANELS = 2
    SUMS = 3  # address: for each thread one number of 8 bytes, to which it adds what it found
    SCRATCH = 4  # address
    SCRATCH_BYTES = 5  # of one thread
    SOURCE = 6
    SOURCE_STEP = 7  # rotate: bytes from row to row
    TARGET = 8
    TARGET_STEP = 9
    COUNT = 10  # rotate: rows; mix_rows: columns
    WIDTH = 11  # rotate: columns
    A, B, Q_A, Q_B = 12, 13, 14, 15  # sizes and packed factors
    FROM, TO = 16, 17  # tables: rotate, of columns in the panel; mix_rows, of rows in memory
    ROWS = 18  # table 0, 1, 2 … of rows in the area
    AREA = 19  # rows of scratch that a panel takes
    BETWEEN = 20  # table: second grid, 0 where there is none
    C, D, Q_C, Q_D = 21, 22, 23, 24
    START, SECOND_START = 25, 26  # first row of the first and of the second grid, in bytes
    TOGETHER = 27  # panels that a thread takes at a time; rotate: 1
    PLUS = 28  # rotate: address of a row that is added to every row of the result, 0 for none
    LENGTH = 29


def build(shape: Shape, triple: str) -> ir.Module:
    """A module that exports `mix_rows`, `rotate`, and what `few` adds."""
    module = ir.Module("obfuscatune")
    module.triple = triple
    multiply = [_multiply(module, shape, height) for height in range(1, shape.height + 1)]
    times, times_looking = (_times(module, shape, multiply, look=look) for look in (False, True))
    _mix_rows(module, shape, _kronecker(module, shape, times, times_looking))
    _rotate(module, shape, _kronecker(module, shape, times, times))
    add_few(module, shape)
    return module


def _multiply(module: ir.Module, shape: Shape, height: int) -> ir.Function:
    """multiply_M(q, k, x, target, offsets, step, next, places, place_step): rows `offsets[m * step]` of target =
    q (M, k) x (k, lanes).

    Meanwhile one line of each of k rows is brought into the cache, rows `places[i * place_step]` of next: spread over
    the sums they cost nothing.
    """
    f = Function(module, f"multiply_{height}", 9, shape)
    b = f.builder
    q, k, x, target, offsets, step, next_, places, place_step = f.arguments
    sums = [[f.local(shape.vector, f.zero()) for _ in range(shape.vectors)] for _ in range(height)]
    with f.loop(k) as i:
        f.fetch(b.add(next_, f.read(b.add(places, b.mul(b.mul(i, place_step), I64(8))), I64)))
        row = f.read_row(b.add(x, b.mul(i, I64(shape.row_bytes))))
        column = b.add(q, b.mul(i, I64(height * shape.itemsize)))
        for m in range(height):
            factor = f.spread(f.read(column, shape.number, m * shape.itemsize))
            for vector, total in zip(row, sums[m], strict=True):
                b.store(f.multiply_add(factor, vector, b.load(total, typ=shape.vector)), total)
    for m in range(height):
        place = f.read(b.add(offsets, b.mul(step, I64(8 * m))), I64)
        f.write_row([b.load(total, typ=shape.vector) for total in sums[m]], b.add(target, place))
    b.ret_void()
    return f.ir


def _times(module: ir.Module, shape: Shape, multiply: list[ir.Function], *, look: bool) -> ir.Function:
    """times(size, q, source, from, from_step, target, to, to_step, staged, seen, next, places, place_step): q (size,
    size) times rows.

    The rows are first copied side by side to `staged`: they are read from there several times. With `look`, the row
    `seen` gains 0 times each, which is NaN for NaN and infinity, and 0 for the rest.
    """
    f = Function(module, "times_looking" if look else "times", 13, shape)
    b = f.builder
    size, q, source, from_, from_step, target, to, to_step, staged, seen, next_, places, place_step = f.arguments
    found = [f.local(shape.vector, vector) for vector in f.read_row(seen)] if look else []
    with f.loop(size) as k:
        place = f.read(b.add(from_, b.mul(b.mul(k, from_step), I64(8))), I64)
        row = f.read_row(b.add(source, place))
        for vector, total in zip(row, found, strict=False):
            b.store(f.multiply_add(vector, f.zero(), b.load(total, typ=shape.vector)), total)
        f.write_row(row, b.add(staged, b.mul(k, I64(shape.row_bytes))))
    if look:
        f.write_row([b.load(total, typ=shape.vector) for total in found], seen)

    blocks = b.udiv(b.add(size, I64(shape.height - 1)), I64(shape.height))
    low, taller = b.udiv(size, blocks), b.urem(size, blocks)
    row_index, q_next = f.local(I64, I64(0)), f.local(I64, q)
    with f.loop(blocks) as block:
        height = b.add(low, b.zext(b.icmp_signed("<", block, taller), I64))
        first, here = b.load(row_index, typ=I64), b.load(q_next, typ=I64)
        offsets = b.add(to, b.mul(b.mul(first, to_step), I64(8)))
        line = b.select(b.icmp_signed("<", block, I64(shape.lines)), b.mul(block, I64(CACHE_LINE)), I64(0))
        fetched = [b.add(next_, line), places, place_step]
        f.call_by_number(multiply, height, [here, size, staged, target, offsets, to_step, *fetched])
        b.store(b.add(first, height), row_index)
        b.store(b.add(here, b.mul(b.mul(height, size), I64(shape.itemsize))), q_next)
    b.ret_void()
    return f.ir


def _kronecker(module: ir.Module, shape: Shape, times: ir.Function, times_first: ir.Function) -> ir.Function:
    """kronecker(a, q_a, b, q_b, source, from, target, to, area, rows, staged, seen, first, stop, last): rows `to` of
    target become (q_a ⊗ q_b) times rows `from` of source, for the panels from `first` to `stop` side by side.

    `area` has room for a·b rows of all these panels in between; for one panel it may be source and target. `last` is
    where in a row of source and target the last panel begins, in bytes: it overlaps the one before.
    """
    f = Function(module, "kronecker" if times is times_first else "kronecker_looking", 15, shape)
    builder = f.builder
    a, q_a, b, q_b, source, from_, target, to, area, rows, staged, seen, first, stop, last = f.arguments
    alone = builder.icmp_signed("==", a, I64(1))
    row_bytes = I64(shape.row_bytes)

    @contextmanager
    def panels() -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
        """Inmost, so that few rows are read and written at a time, and long pieces of each."""
        with f.loop(stop, start=first) as panel:
            there = builder.mul(panel, row_bytes)
            shift = builder.select(builder.icmp_signed("<", there, last), there, last)
            yield (
                builder.add(source, shift),
                builder.add(area, builder.mul(builder.sub(panel, first), row_bytes)),
                builder.add(target, shift),
            )

    with f.loop(a) as i:
        group = builder.mul(builder.mul(i, b), I64(8))
        here, there = builder.add(from_, group), builder.add(builder.select(alone, to, rows), group)
        with panels() as (source_panel, area_panel, target_panel):
            middle = builder.select(alone, target_panel, area_panel)
            to_come = [builder.add(source_panel, row_bytes), here, I64(1)]
            rows_of_group = [source_panel, here, I64(1), middle, there, I64(1)]
            builder.call(times_first, [b, q_b, *rows_of_group, staged, seen, *to_come])
    with f.loop(builder.select(alone, I64(0), b)) as j:
        offset = builder.mul(j, I64(8))
        here, there = builder.add(rows, offset), builder.add(to, offset)
        with panels() as (_, area_panel, target_panel):
            to_come = [builder.add(target_panel, row_bytes), there, b]
            builder.call(times, [a, q_a, area_panel, here, b, target_panel, there, b, staged, seen, *to_come])
    builder.ret_void()
    return f.ir


class _Panels:
    """What every exported kernel begins with: its job, this thread's scratch memory, and the loop over panels."""

    def __init__(self, f: Function) -> None:
        self.f = f
        thread = f.take(Job.NEXT_THREAD, I64(1))
        b = f.builder
        self._sum = b.add(self[Job.SUMS], b.mul(thread, I64(8)))
        self.scratch = b.add(self[Job.SCRATCH], b.mul(thread, self[Job.SCRATCH_BYTES]))

    def __getitem__(self, key: Job) -> ir.Value:
        return self.f.field(key)

    @contextmanager
    def each(self, seen: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Around what is to be done for the panels from one number to another; afterwards what `seen` has gained is
        added to the thread's sum."""
        f = self.f
        with f.shares(Job.NEXT_PANEL, self[Job.TOGETHER], self[Job.PANELS]) as panels:
            f.write_row([f.zero()] * f.shape.vectors, seen)
            yield panels
            self._add_up(seen)

    def _add_up(self, seen: ir.Value) -> None:
        """In float64."""
        f, b = self.f, self.f.builder
        wide = ir.DoubleType()
        total = f.local(wide, f.read(self._sum, wide))
        with f.loop(I64(f.shape.lanes)) as lane:
            value = f.read(b.add(seen, b.mul(lane, I64(f.shape.itemsize))), f.shape.number)
            value = b.fpext(value, wide) if f.shape.itemsize == 4 else value
            b.store(b.fadd(b.load(total, typ=wide), value), total)
        f.write(b.load(total, typ=wide), self._sum)


def _mix_rows(module: ir.Module, shape: Shape, kronecker: ir.Function) -> None:
    """Scratch: the row of what was seen, the panels that are taken together (AREA rows), then staged rows."""
    f = Function(module, "mix_rows", 1, shape, exported=True)
    b, job = f.builder, _Panels(f)
    a_size, b_size = job[Job.A], job[Job.B]
    seen = job.scratch
    area = b.add(seen, I64(shape.row_bytes))
    staged = b.add(area, b.mul(job[Job.AREA], b.mul(job[Job.TOGETHER], I64(shape.row_bytes))))
    width = b.mul(job[Job.COUNT], I64(shape.itemsize))
    with job.each(seen) as panels:
        sizes = [a_size, job[Job.Q_A], b_size, job[Job.Q_B]]
        places = [job[Job.SOURCE], job[Job.FROM], job[Job.TARGET], job[Job.TO], area, job[Job.ROWS]]
        b.call(kronecker, [*sizes, *places, staged, seen, *panels, b.sub(width, I64(shape.row_bytes))])
    b.ret_void()


def _rotate(module: ir.Module, shape: Shape, kronecker: ir.Function) -> None:
    """Scratch: the row of what was seen, addresses of rows, a row of zeros and one for what is of no use (AREA
    numbers each), the panel (AREA rows, twice that for two grids), then staged rows."""
    f = Function(module, "rotate", 1, shape, exported=True)
    b, job = f.builder, _Panels(f)
    width = job[Job.WIDTH]
    area_bytes = b.mul(job[Job.AREA], I64(shape.row_bytes))
    seen = job.scratch
    addresses = b.add(seen, I64(shape.row_bytes))
    zeros = b.add(addresses, I64(8 * shape.lanes))
    unused = b.add(zeros, b.mul(job[Job.AREA], I64(shape.itemsize)))
    area = b.add(unused, b.mul(job[Job.AREA], I64(shape.itemsize)))
    second = b.add(area, area_bytes)
    two_grids = b.icmp_signed("!=", job[Job.BETWEEN], I64(0))
    staged = b.add(area, b.select(two_grids, b.mul(area_bytes, I64(2)), area_bytes))
    rows = job[Job.ROWS]
    with f.loop(job[Job.AREA], step=shape.lanes) as column:
        f.write_row([f.zero()] * shape.vectors, b.add(zeros, b.mul(column, I64(shape.itemsize))))
    alone = [I64(0), I64(1), I64(0)]  # one panel, from where it begins
    with job.each(seen) as (panel, _):
        _row_addresses(f, job, panel, addresses, Job.SOURCE, Job.SOURCE_STEP, zeros)
        _transpose_in(f, addresses, width, area, job[Job.FROM], seen)
        grid = b.add(area, job[Job.START])
        sizes = [job[Job.A], job[Job.Q_A], job[Job.B], job[Job.Q_B]]
        b.call(kronecker, [*sizes, grid, rows, grid, rows, grid, rows, staged, seen, *alone])
        result = f.local(I64, area)
        with b.if_then(two_grids):
            with f.loop(width) as k:
                place = f.read(b.add(job[Job.BETWEEN], b.mul(k, I64(8))), I64)
                f.write_row(f.read_row(b.add(area, place)), b.add(second, b.mul(k, I64(shape.row_bytes))))
            grid = b.add(second, job[Job.SECOND_START])
            sizes = [job[Job.C], job[Job.Q_C], job[Job.D], job[Job.Q_D]]
            b.call(kronecker, [*sizes, grid, rows, grid, rows, grid, rows, staged, seen, *alone])
            b.store(second, result)
        _row_addresses(f, job, panel, addresses, Job.TARGET, Job.TARGET_STEP, unused)
        plus = b.select(b.icmp_signed("==", job[Job.PLUS], I64(0)), zeros, job[Job.PLUS])
        _transpose_out(f, b.load(result, typ=I64), job[Job.TO], plus, addresses, width)
    b.ret_void()


def _row_addresses(
    f: Function, job: _Panels, panel: ir.Value, addresses: ir.Value, base: Job, step: Job, beyond: ir.Value
) -> None:
    """Lay down the address of each of the panel's rows of x; `beyond` for those after the last."""
    b = f.builder
    with f.loop(I64(f.shape.lanes)) as lane:
        row = b.add(b.mul(panel, I64(f.shape.lanes)), lane)
        there = b.add(job[base], b.mul(row, job[step]))
        address = b.select(b.icmp_signed("<", row, job[Job.COUNT]), there, beyond)
        f.write(address, b.add(addresses, b.mul(lane, I64(8))))


def _column_blocks(f: Function, width: ir.Value, column: ir.Value) -> ir.Value:
    """The last block of columns overlaps the one before."""
    last = f.builder.sub(width, I64(f.shape.width))
    return f.builder.select(f.builder.icmp_signed("<", column, last), column, last)


def _transpose_in(
    f: Function, addresses: ir.Value, width: ir.Value, area: ir.Value, places: ir.Value, seen: ir.Value
) -> None:
    """Row `places[j]` of the area = column j of the rows at `addresses`; `seen` gains the squares, each once."""
    b, shape = f.builder, f.shape
    found = [f.local(shape.vector, vector) for vector in f.read_row(seen)]
    lane_numbers = ir.Constant(ir.VectorType(I64, shape.width), list(range(shape.width)))
    with f.loop(width, step=shape.width) as block:
        column = _column_blocks(f, width, block)
        shift = b.mul(column, I64(shape.itemsize))
        is_new = b.icmp_signed(">=", lane_numbers, f.spread(b.sub(block, column)))
        for v, total in enumerate(found):
            lanes = range(v * shape.width, (v + 1) * shape.width)
            tile = [f.read(b.add(f.read(addresses, I64, 8 * lane), shift), shape.vector) for lane in lanes]
            for vector in tile:
                counted = b.select(is_new, vector, f.zero())
                b.store(f.multiply_add(counted, counted, b.load(total, typ=shape.vector)), total)
            for j, vector in enumerate(f.transpose(tile)):
                place = f.read(b.add(places, b.mul(column, I64(8))), I64, 8 * j)
                f.write(vector, b.add(area, place), v * shape.width * shape.itemsize)
    f.write_row([b.load(total, typ=shape.vector) for total in found], seen)


def _transpose_out(
    f: Function, area: ir.Value, places: ir.Value, plus: ir.Value, addresses: ir.Value, width: ir.Value
) -> None:
    """Column j of the rows at `addresses` = row `places[j]` of the area, and number j of `plus` added to each."""
    b, shape = f.builder, f.shape
    with f.loop(width, step=shape.width) as block:
        column = _column_blocks(f, width, block)
        shift = b.mul(column, I64(shape.itemsize))
        added = f.read(b.add(plus, shift), shape.vector)
        for v in range(shape.vectors):
            tile = []
            for j in range(shape.width):
                place = f.read(b.add(places, b.mul(column, I64(8))), I64, 8 * j)
                tile.append(f.read(b.add(area, place), shape.vector, v * shape.width * shape.itemsize))
            for lane, vector in enumerate(f.transpose(tile)):
                address = f.read(addresses, I64, 8 * (v * shape.width + lane))
                f.write(b.fadd(vector, added), b.add(address, shift))
