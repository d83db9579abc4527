"""Normal deviates from random words, by Box and Muller (1958), in one pass: what shield rows are made of.

    k = 2²⁴ - ⌊w₁ / 2⁸⌋,  n = ⌊w₂ / 2⁸⌋           24 bits of two words
    radius = √(-2 log(k 2⁻²⁴)),  angle = 2π n 2⁻²⁴
    z₁ = radius cos(angle),  z₂ = radius sin(angle)

Logarithm, sine and cosine are polynomials, interpolated at Chebyshev's points and as precise as float32 is.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from obfuscatune.jit import team
from obfuscatune.jit.emit import I32, I64, Function, Shape
from obfuscatune.jit.engine import Engine, compiled_once, host_shape

PAIRS_TOGETHER = 1 << 12
"""That a thread takes at a time."""
PAIRS_PER_THREAD = 1 << 14
"""Fewer are not worth waking a thread for."""

_LOG = (  # (log(1 + x) - x + x²/2) / x³ between √½ and √2
    0.333333312,
    -0.24999997,
    0.200007157,
    -0.166678023,
    0.142490576,
    -0.124256873,
    0.116854199,
    -0.11479734,
    0.0697161168,
)
_SINE = (1.57079632, -0.645963478, 0.0796802176, -0.00460214921)  # sin(πx/2) / x in x², up to ½
_COSINE = (1.0, -1.23370054, 0.253669204, -0.0208600695, 0.000903628059)  # cos(πx/2), likewise
_SQRT_HALF_BITS = 0x3F3504F3
_FRACTION_BITS, _FRACTION = 23, (1 << 23) - 1


class Job(IntEnum):
    """Where each number stands in a job."""

    NEXT_PAIR = 0  # taken by threads, one after another
    WORDS = 1  # address of 2 · PAIRS words of 4 bytes, which become deviates
    PAIRS = 2  # a multiple of a vector's width
    TOGETHER = 3  # likewise
    LENGTH = 4


def from_words(words: NDArray[np.uint32], threads: int, shape: Shape | None = None) -> NDArray[np.float32]:
    """The words (2k,), uniform, as deviates (2k,) in their place; k a multiple of 16.

    `shape`: other registers than this processor's; what comes out is the same, to rounding.
    """
    kernel = _compiled(shape or host_shape(4)).address("deviates")
    pairs = words.size // 2
    fields = {Job.WORDS: words.ctypes.data, Job.PAIRS: pairs, Job.TOGETHER: PAIRS_TOGETHER}
    job = (ctypes.c_int64 * Job.LENGTH)()
    for key, value in fields.items():
        job[key] = value
    team.run(kernel, ctypes.addressof(job), max(min(threads, pairs // PAIRS_PER_THREAD), 1))
    return words.view(np.float32)


@compiled_once
def _compiled(shape: Shape) -> Engine:
    return Engine(functools.partial(build, shape))


def build(shape: Shape, triple: str) -> ir.Module:
    """A module that exports `deviates`."""
    module = ir.Module("obfuscatune_deviates")
    module.triple = triple
    f = Function(module, "deviates", 1, shape, exported=True)
    b = f.builder
    words, pairs = f.field(Job.WORDS), f.field(Job.PAIRS)
    with (
        f.shares(Job.NEXT_PAIR, f.field(Job.TOGETHER), pairs) as (start, stop),
        f.loop(stop, start=start, step=shape.width) as pair,
    ):
        first = b.add(words, b.mul(pair, I64(4)))
        second = b.add(first, b.mul(pairs, I64(4)))
        vector = ir.VectorType(I32, shape.width)
        radius = _radius(f, f.read(first, vector))
        sine, cosine = _sine_and_cosine(f, f.read(second, vector))
        f.write(b.fmul(radius, cosine), first)
        f.write(b.fmul(radius, sine), second)
    b.ret_void()
    return module


def _radius(f: Function, word: ir.Value) -> ir.Value:
    """√(-2 log(k 2⁻²⁴)): k = m 2ᵉ with m between √½ and √2, so that nothing cancels where k is near 2²⁴."""
    b, vector = f.builder, f.shape.vector
    k = b.sub(_all(f, 1 << 24), b.lshr(word, _all(f, 8)))
    bits = b.sub(b.bitcast(b.uitofp(k, vector), word.type), _all(f, _SQRT_HALF_BITS))
    exponent = b.sitofp(b.sub(b.ashr(bits, _all(f, _FRACTION_BITS)), _all(f, 24)), vector)
    m = b.bitcast(b.add(b.and_(bits, _all(f, _FRACTION)), _all(f, _SQRT_HALF_BITS)), vector)
    x = b.fsub(m, _every(f, 1.0))
    square = b.fmul(x, x)
    tail = f.multiply_add(b.fmul(square, x), _polynomial(f, _LOG, x), b.fmul(square, _every(f, -0.5)))
    log = f.multiply_add(exponent, _every(f, math.log(2)), b.fadd(x, tail))
    doubled = b.fmul(log, _every(f, -2.0))
    doubled = b.select(b.fcmp_ordered(">", doubled, f.zero()), doubled, f.zero())
    return _square_root(f, doubled)


def _sine_and_cosine(f: Function, word: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of 2π n 2⁻²⁴: n is q quarter turns and a rest of half a quarter at most, either way."""
    b, vector = f.builder, f.shape.vector
    n = b.lshr(word, _all(f, 8))
    quarters = b.lshr(b.add(n, _all(f, 1 << 21)), _all(f, 22))
    rest = b.fmul(b.sitofp(b.sub(n, b.shl(quarters, _all(f, 22))), vector), _every(f, 2.0**-22))
    square = b.fmul(rest, rest)
    sine, cosine = b.fmul(rest, _polynomial(f, _SINE, square)), _polynomial(f, _COSINE, square)
    odd = b.icmp_unsigned("!=", b.and_(quarters, _all(f, 1)), _all(f, 0))
    sine, cosine = b.select(odd, cosine, sine), b.select(odd, sine, cosine)
    return _with_sign(f, sine, quarters), _with_sign(f, cosine, b.add(quarters, _all(f, 1)))


def _with_sign(f: Function, x: ir.Value, quarters: ir.Value) -> ir.Value:
    """x, or -x in the second half of a turn: bit 1 of `quarters` becomes the sign."""
    b = f.builder
    sign = b.shl(b.and_(quarters, _all(f, 2)), _all(f, 30))
    return b.bitcast(b.xor(b.bitcast(x, quarters.type), sign), x.type)


def _polynomial(f: Function, coefficients: Sequence[float], x: ir.Value) -> ir.Value:
    """c₀ + c₁ x + c₂ x² …, by Horner."""
    *rest, total = (_every(f, coefficient) for coefficient in coefficients)
    for coefficient in reversed(rest):
        total = f.multiply_add(total, x, coefficient)
    return total


def _square_root(f: Function, x: ir.Value) -> ir.Value:
    name = f"llvm.sqrt.v{f.shape.width}f32"
    root = f.module.globals.get(name) or ir.Function(f.module, ir.FunctionType(x.type, [x.type]), name)
    return f.builder.call(root, [x])


def _every(f: Function, number: float) -> ir.Value:
    """A vector of that number, as float32 holds it."""
    return ir.Constant(f.shape.vector, [float(np.float32(number))] * f.shape.width)


def _all(f: Function, number: int) -> ir.Value:
    """A vector of that integer."""
    return ir.Constant(ir.VectorType(I32, f.shape.width), [number] * f.shape.width)
