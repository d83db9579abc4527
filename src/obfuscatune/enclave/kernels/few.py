"""Kernels for few rows, on one thread: `turn` rotates them one after another, `multiply` mixes them; `send` and
`receive` do both, one way and back.

    x  ->  picked by Π₁  ->  (Q_a ⊗ Q_b) on the first grid  ( ->  picked by Π₂  ->  on the second )  ->  picked  ->  x R

    send       x  ->  turned, above the shield rows  ->  A times these  ->  what is sent
    receive    what came  ->  n rows of Aᵀ times it  ->  turned back

A row of the grid is a·b numbers as an (a, b) matrix U: Q_aᵀ U, then times Q_b, vectors of columns at a time; where b is
no multiple of a vector, the last one overlaps the one before and computes the same again.
"""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from obfuscatune.jit.emit import I64, Function, Shape


class Job(IntEnum):
    """Where each number stands in a job."""

    X = 0  # addresses
    Y = 1
    ROWS = 2
    X_STEP = 3  # bytes from row to row
    WIDTH = 4
    FROM, BETWEEN, TO = 5, 6, 7  # tables of offsets in bytes; BETWEEN is 0 where there is one grid
    START, A, Q_A, B, Q_B = 8, 9, 10, 11, 12  # first column of the grid in bytes; sizes; Q_aᵀ and Q_b, row by row
    SECOND_START, C, Q_C, D, Q_D = 13, 14, 15, 16, 17
    SCRATCH = 18  # three rows
    SQUARES = 19  # address of a float64, to which the squares of x are added
    STACK = 20  # address of (M, WIDTH): x turned goes above the shield rows that lie there; receive: what is unmixed
    M = 21
    MIXING = 22  # address of A (M, M) to send, of Aᵀ to receive
    CROSSED = 23  # address of (M, WIDTH): send writes it, receive reads it
    LENGTH = 24


FIRST_GRID = (Job.START, Job.A, Job.Q_A, Job.B, Job.Q_B)
SECOND_GRID = (Job.SECOND_START, Job.C, Job.Q_C, Job.D, Job.Q_D)


class Product(IntEnum):
    """Likewise, for OUT (rows, columns) = LEFT (rows, inner) RIGHT (inner, columns)."""

    LEFT, RIGHT, OUT = 0, 1, 2  # addresses; row by row without gaps
    ROWS, INNER, COLUMNS = 3, 4, 5  # at least a vector of columns
    LENGTH = 6


def add_few(module: ir.Module, shape: Shape) -> None:
    """Add `turn`, `multiply`, `send` and `receive`, exported."""
    multiply = _multiply(module, shape)
    f = Function(module, "multiply", 1, shape, exported=True)
    f.builder.call(multiply, [f.field(key) for key in Product if key < Product.LENGTH])
    f.builder.ret_void()
    turn = _add_turn(module, shape, multiply)
    _add_send(module, shape, turn, multiply)
    _add_receive(module, shape, turn, multiply)


def _add_send(module: ir.Module, shape: Shape, turn: ir.Function, multiply: ir.Function) -> None:
    f = Function(module, "send", 1, shape, exported=True)
    b = f.builder
    b.call(turn, [f.arguments[0]])
    m = f.field(Job.M)
    b.call(multiply, [f.field(Job.MIXING), f.field(Job.STACK), f.field(Job.CROSSED), m, m, f.field(Job.WIDTH)])
    b.ret_void()


def _add_receive(module: ir.Module, shape: Shape, turn: ir.Function, multiply: ir.Function) -> None:
    f = Function(module, "receive", 1, shape, exported=True)
    operands = [f.field(key) for key in (Job.MIXING, Job.CROSSED, Job.STACK, Job.ROWS, Job.M, Job.WIDTH)]
    f.builder.call(multiply, operands)
    f.builder.call(turn, [f.arguments[0]])
    f.builder.ret_void()


def _add_turn(module: ir.Module, shape: Shape, multiply: ir.Function) -> ir.Function:
    pick = _pick(module, shape)
    f = Function(module, "turn", 1, shape, exported=True)
    b = f.builder
    width, size = f.field(Job.WIDTH), I64(shape.itemsize)
    row_bytes = b.mul(width, size)
    first = f.field(Job.SCRATCH)
    second, third = b.add(first, row_bytes), b.add(first, b.mul(row_bytes, I64(2)))
    two_grids = b.icmp_signed("!=", f.field(Job.BETWEEN), I64(0))
    with f.loop(f.field(Job.ROWS)) as row:
        x = b.add(f.field(Job.X), b.mul(row, f.field(Job.X_STEP)))
        _add_squares(f, x, width, f.field(Job.SQUARES))
        b.call(pick, [x, f.field(Job.FROM), first, width])
        result = f.local(I64, first)
        _on_grid(f, multiply, first, third, FIRST_GRID)
        with b.if_then(two_grids):
            b.call(pick, [first, f.field(Job.BETWEEN), second, width])
            _on_grid(f, multiply, second, third, SECOND_GRID)
            b.store(second, result)
        y = b.add(f.field(Job.Y), b.mul(row, row_bytes))
        b.call(pick, [b.load(result, typ=I64), f.field(Job.TO), y, width])
    b.ret_void()
    return f.ir


def _on_grid(f: Function, multiply: ir.Function, row: ir.Value, spare: ir.Value, keys: tuple[Job, ...]) -> None:
    """The (a, b) matrix U that begins some bytes into the row becomes Q_aᵀ U Q_b."""
    start, a, q_a, b, q_b = (f.field(key) for key in keys)
    grid = f.builder.add(row, start)
    f.builder.call(multiply, [q_a, grid, spare, a, a, b])
    f.builder.call(multiply, [spare, q_b, grid, a, b, b])


def _multiply(module: ir.Module, shape: Shape) -> ir.Function:
    """multiply(left, right, out, rows, inner, columns): out = left right, (rows, inner) times (inner, columns).

    All row by row without gaps; at least a vector of columns. Two rows by two vectors at a time, so that no sum need
    wait for itself; of an odd number of rows, the last is computed twice.
    """
    f = Function(module, "multiply_few", 6, shape)
    b = f.builder
    left, right, out, rows, inner, columns = f.arguments
    size = I64(shape.itemsize)
    last_row, last_column = b.sub(rows, I64(1)), b.mul(b.sub(columns, I64(shape.width)), size)
    step = b.mul(columns, size)
    with f.loop(rows, step=2) as row:
        pair = [row, f.at_most(b.add(row, I64(1)), last_row)]
        factors = [b.add(left, b.mul(b.mul(one, inner), size)) for one in pair]
        targets = [b.add(out, b.mul(one, step)) for one in pair]
        with f.loop(columns, step=2 * shape.width) as column:
            places = [b.mul(b.add(column, I64(shape.width * v)), size) for v in range(2)]
            places = [f.at_most(place, last_column) for place in places]
            sums = [[f.local(shape.vector, f.zero()) for _ in places] for _ in pair]
            with f.loop(inner) as k:
                line = b.add(right, b.mul(k, step))
                vectors = [f.read(b.add(line, place), shape.vector) for place in places]
                for row_factors, totals in zip(factors, sums, strict=True):
                    factor = f.spread(f.read(b.add(row_factors, b.mul(k, size)), shape.number))
                    for vector, total in zip(vectors, totals, strict=True):
                        b.store(f.multiply_add(factor, vector, b.load(total, typ=shape.vector)), total)
            for target, totals in zip(targets, sums, strict=True):
                for place, total in zip(places, totals, strict=True):
                    f.write(b.load(total, typ=shape.vector), b.add(target, place))
    b.ret_void()
    return f.ir


def _pick(module: ir.Module, shape: Shape) -> ir.Function:
    """pick(row, table, out, width): number j of out is that which lies `table[j]` bytes into the row."""
    f = Function(module, "pick", 4, shape)
    b = f.builder
    row, table, out, width = f.arguments
    with f.loop(width) as j:
        place = f.read(b.add(table, b.mul(j, I64(8))), I64)
        f.write(f.read(b.add(row, place), shape.number), b.add(out, b.mul(j, I64(shape.itemsize))))
    b.ret_void()
    return f.ir


def _add_squares(f: Function, x: ir.Value, width: ir.Value, squares: ir.Value) -> None:
    """In float64, one vector of x after another; what is left over, number by number."""
    b, shape = f.builder, f.shape
    wide = ir.DoubleType()
    total = f.local(shape.vector, f.zero())
    whole = b.mul(b.udiv(width, I64(shape.width)), I64(shape.width))
    with f.loop(whole, step=shape.width) as column:
        vector = f.read(b.add(x, b.mul(column, I64(shape.itemsize))), shape.vector)
        b.store(f.multiply_add(vector, vector, b.load(total, typ=shape.vector)), total)
    found = f.local(wide, f.read(squares, wide))

    def add(number: ir.Value) -> None:
        number = b.fpext(number, wide) if shape.itemsize == 4 else number
        b.store(b.fadd(b.load(found, typ=wide), number), found)

    for lane in range(shape.width):
        add(b.extract_element(b.load(total, typ=shape.vector), I64(lane)))
    with f.loop(width, start=whole) as column:
        number = f.read(b.add(x, b.mul(column, I64(shape.itemsize))), shape.number)
        add(b.fmul(number, number))
    f.write(b.load(found, typ=wide), squares)
