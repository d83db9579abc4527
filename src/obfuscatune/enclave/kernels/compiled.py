"""The kernels of rotation and mixing in memory, for either size of number."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from obfuscatune.enclave.kernels.source import build
from obfuscatune.jit.emit import Shape
from obfuscatune.jit.engine import Engine, compiled_once, host_shape


@dataclass(frozen=True, eq=False)
class Compiled:
    """Addresses of the kernels, each `void(int64_t *job)`, and the shape of the panels that they work on."""

    shape: Shape
    mix_rows: int
    rotate: int
    turn: int
    multiply: int
    send: int
    receive: int
    engine: Engine = field(repr=False)


@compiled_once
def compiled(itemsize: int) -> Compiled:
    """The kernels for numbers of 4 or 8 bytes, in the shape that suits this processor; compiled at the first call."""
    return compile_for(host_shape(itemsize))


def compile_for(shape: Shape) -> Compiled:
    """Compile the kernels in any shape; one that the processor has no registers for is slow."""
    engine = Engine(functools.partial(build, shape))
    names = ("mix_rows", "rotate", "turn", "multiply", "send", "receive")
    return Compiled(shape=shape, engine=engine, **{name: engine.address(name) for name in names})
