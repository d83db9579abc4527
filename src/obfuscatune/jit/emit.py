"""Writing LLVM IR a little above the instruction: loops, addresses, vectors. Nothing here knows of transforms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
BYTE = ir.IntType(8)
POINTER = ir.PointerType()
CACHE_LINE = 64


@dataclass(frozen=True)
class Shape:
    """How the kernels lay numbers out: chosen by what the processor's registers hold."""

    itemsize: int
    """Bytes of a number: 4 or 8."""
    width: int
    """Numbers in one vector register."""
    vectors: int
    """Registers side by side in a row of a panel."""
    height: int
    """Rows of a product that are computed at a time; `height * vectors` sums stay in registers."""

    @property
    def lanes(self) -> int:
        """Numbers in a row of a panel."""
        return self.width * self.vectors

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a panel."""
        return self.lanes * self.itemsize

    @property
    def lines(self) -> int:
        """Lines of the cache that a row of a panel fills."""
        return max(self.row_bytes // CACHE_LINE, 1)

    @property
    def number(self) -> ir.Type:
        """One number."""
        return ir.FloatType() if self.itemsize == 4 else ir.DoubleType()

    @property
    def vector(self) -> ir.VectorType:
        """One register."""
        return ir.VectorType(self.number, self.width)


class Function:
    """A function under construction, and what is written into it."""

    def __init__(self, module: ir.Module, name: str, arguments: int, shape: Shape, *, exported: bool = False) -> None:
        """Every argument is 64 bits wide: a number, or an address."""
        self.shape = shape
        self.module = module
        self.ir = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
        self.ir.linkage = "external" if exported else "internal"
        self._entry = self.ir.append_basic_block("entry")
        body = self.ir.append_basic_block("body")
        self._entry_end = ir.IRBuilder(self._entry).branch(body)
        self.builder = ir.IRBuilder(body)

    @property
    def arguments(self) -> tuple[ir.Value, ...]:
        """As passed."""
        return tuple(self.ir.args)

    def local(self, kind: ir.Type, initial: ir.Value) -> ir.Value:
        """A variable; it ends up in a register."""
        slot = ir.IRBuilder(self._entry)
        slot.position_before(self._entry_end)
        variable = slot.alloca(kind)
        self.builder.store(initial, variable)
        return variable

    @contextmanager
    def loop(self, stop: ir.Value, *, start: ir.Value | int = 0, step: int = 1) -> Iterator[ir.Value]:
        """`for index in range(start, stop, step)`; the loop's body is what is written inside the `with`."""
        b = self.builder
        counter = self.local(I64, I64(start) if isinstance(start, int) else start)
        head, body, end = (self.ir.append_basic_block(name) for name in ("head", "turn", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.load(counter, typ=I64)
        b.cbranch(b.icmp_signed("<", index, stop), body, end)
        b.position_at_end(body)
        yield index
        b.store(b.add(index, I64(step)), counter)
        b.branch(head)
        b.position_at_end(end)

    def at_most(self, value: ir.Value, most: ir.Value) -> ir.Value:
        """The smaller of two signed numbers."""
        return self.builder.select(self.builder.icmp_signed("<", value, most), value, most)

    def call_by_number(self, functions: Sequence[ir.Function], number: ir.Value, arguments: list[ir.Value]) -> None:
        """Call the first of the functions for 1, the second for 2 …; none for any other number."""
        b = self.builder
        done = self.ir.append_basic_block("called")
        switch = b.switch(number, done)
        for case_number, function in enumerate(functions, 1):
            case = self.ir.append_basic_block(f"number_{case_number}")
            switch.add_case(I64(case_number), case)
            b.position_at_end(case)
            b.call(function, arguments)
            b.branch(done)
        b.position_at_end(done)

    def field(self, key: int) -> ir.Value:
        """A number of the job that the first argument is the address of."""
        return self.read(self.arguments[0], I64, 8 * key)

    def take(self, key: int, count: ir.Value) -> ir.Value:
        """What a counter of the job stood at before it went up by `count`; no two threads are given the same."""
        place = self._pointer(self.arguments[0], 8 * key)
        return self.builder.atomic_rmw("add", place, count, "monotonic")

    def load_shared(self, address: ir.Value, offset: int = 0) -> ir.Value:
        """What another process last stored there; all that it stored before is seen by what is loaded afterwards."""
        return self.builder.load_atomic(self._pointer(address, offset), "seq_cst", 8, typ=I64)

    def store_shared(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """Store a number for another process to see, after all that was stored before and before all loaded after."""
        self.builder.atomic_rmw("xchg", self._pointer(address, offset), value, "seq_cst")

    def rest(self) -> None:
        """In a loop that waits for another core: let the processor know."""
        instruction = "yield" if self._is_arm else "pause"
        self.builder.asm(ir.FunctionType(ir.VoidType(), []), instruction, "", [], side_effect=True)

    def ticks(self) -> ir.Value:
        """The processor's clock, which runs at the same speed always."""
        if self._is_arm:
            return self.builder.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], side_effect=True)
        kind = ir.FunctionType(I64, [])
        clock = self.module.globals.get("llvm.readcyclecounter") or ir.Function(
            self.module, kind, "llvm.readcyclecounter"
        )
        return self.builder.call(clock, [])

    @contextmanager
    def shares(self, counter: int, together: ir.Value, total: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Around what is done from one number to another: threads take `together` at a time, up to `total`."""
        b = self.builder
        head, taken, end = (self.ir.append_basic_block(name) for name in ("take", "taken", "nothing_left"))
        b.branch(head)
        b.position_at_end(head)
        start = self.take(counter, together)
        b.cbranch(b.icmp_signed("<", start, total), taken, end)
        b.position_at_end(taken)
        yield start, self.at_most(b.add(start, together), total)
        b.branch(head)
        b.position_at_end(end)

    def read(self, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
        """What lies `offset` bytes behind an address; it need not be aligned to more than a number."""
        return self.builder.load(self._pointer(address, offset), typ=kind, align=self._alignment(kind))

    def write(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """The reverse of `read`."""
        self.builder.store(value, self._pointer(address, offset), align=self._alignment(value.type))

    def read_row(self, address: ir.Value) -> list[ir.Value]:
        """A row of a panel: `vectors` registers."""
        size = self.shape.width * self.shape.itemsize
        return [self.read(address, self.shape.vector, size * v) for v in range(self.shape.vectors)]

    def write_row(self, row: list[ir.Value], address: ir.Value) -> None:
        """The reverse of `read_row`."""
        for v, vector in enumerate(row):
            self.write(vector, address, self.shape.width * self.shape.itemsize * v)

    def fetch(self, address: ir.Value, *, level: int = 1) -> None:
        """Have the line at an address, which need not be valid, brought into the first cache, or into the second.

        More lines can be on their way to the second at a time.
        """
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        prefetch = self.module.globals.get("llvm.prefetch.p0") or ir.Function(self.module, kind, "llvm.prefetch.p0")
        self.builder.call(prefetch, [self._pointer(address, 0), I32(0), I32(4 - level), I32(1)])  # to read, data

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector whose numbers are all `value`."""
        undefined = ir.Constant(ir.VectorType(value.type, self.shape.width), ir.Undefined)
        first = self.builder.insert_element(undefined, value, I32(0))
        everywhere = ir.Constant(ir.VectorType(I32, self.shape.width), [0] * self.shape.width)
        return self.builder.shuffle_vector(first, undefined, everywhere)

    def zero(self) -> ir.Value:
        """A vector of zeros."""
        return ir.Constant(self.shape.vector, [0.0] * self.shape.width)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c for vectors, rounded once; NaN and infinity pass through as the standard says."""
        kind = self.shape.vector
        suffix = f"v{self.shape.width}f{8 * self.shape.itemsize}"
        fma = self.module.globals.get(f"llvm.fma.{suffix}")
        if fma is None:
            fma = ir.Function(self.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.{suffix}")
        return self.builder.call(fma, [a, b, c])

    def transpose(self, rows: list[ir.Value]) -> list[ir.Value]:
        """`width` vectors as columns: at distance 1, 2, 4 … the off-diagonal blocks of two rows change places."""
        b, width = self.builder, self.shape.width
        rows = list(rows)
        distance = 1
        while distance < width:
            low = [lane if not lane & distance else width + lane - distance for lane in range(width)]
            high = [lane + distance if not lane & distance else width + lane for lane in range(width)]
            masks = [ir.Constant(ir.VectorType(I32, width), mask) for mask in (low, high)]
            for i in range(width):
                if not i & distance:
                    pair = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = (b.shuffle_vector(*pair, mask) for mask in masks)
            distance *= 2
        return rows

    def _pointer(self, address: ir.Value, offset: int) -> ir.Value:
        b = self.builder
        base = b.inttoptr(address, POINTER)
        return b.gep(base, [I64(offset)], source_etype=BYTE) if offset else base

    @property
    def _is_arm(self) -> bool:
        return str(self.module.triple).startswith(("aarch64", "arm64"))

    def _alignment(self, kind: ir.Type) -> int:
        return 8 if kind == I64 else self.shape.itemsize
