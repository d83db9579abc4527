"""The enclave's end of a slot: a request is posted, and its answer waited for, each by one call."""

from __future__ import annotations

import ctypes
import functools
import time
from enum import IntEnum

import torch
from llvmlite import ir

from obfuscatune.enclave.link.slot import State
from obfuscatune.jit import team
from obfuscatune.jit.emit import I64, Function
from obfuscatune.jit.engine import Engine, compiled_once, host_shape
from obfuscatune.wire.slot import SLOT_BYTES, Word

_CALIBRATION_TURNS = 1 << 14


class Post(IntEnum):
    """Where each number stands in a job of `post`."""

    SLOT = 0  # address
    NUMBER = 1
    MATRIX, ROWS, FROM, TO = 2, 3, 4, 5
    WATCHED = 6  # whether a worker was watching
    LENGTH = 7


class Wait(IntEnum):
    """Likewise, of `wait`."""

    SLOT = 0
    NUMBER = 1
    TURNS = 2
    STATE = 3
    LENGTH = 4


class SlotKernels:
    """`post` and `wait`, compiled."""

    def __init__(self) -> None:
        self._engine = Engine(_build)
        self._post, self._wait = self._engine.address("post"), self._engine.address("wait")

    def post(self, slot: int, number: int, matrix: int, rows: int, from_: int, to: int) -> bool:
        """Post a request in the slot at that address; whether a worker watches."""
        job = (ctypes.c_int64 * Post.LENGTH)(slot, number, matrix, rows, from_, to, 0)
        team.run(self._post, ctypes.addressof(job), 1)
        return job[Post.WATCHED] == 1

    def wait(self, slot: int, number: int, turns: int) -> State:
        """Wait for the answer to a request, awake."""
        job = (ctypes.c_int64 * Wait.LENGTH)(slot, number, turns, 0)
        team.run(self._wait, ctypes.addressof(job), 1)
        return State(job[Wait.STATE])

    @functools.cached_property
    def turns_per_second(self) -> float:
        """How often `wait` looks."""
        slot = torch.zeros(SLOT_BYTES // 8, dtype=torch.int64)
        slot[Word.WATCHED] = 1
        started = time.perf_counter()
        self.wait(slot.data_ptr(), 1, _CALIBRATION_TURNS)
        return _CALIBRATION_TURNS / (time.perf_counter() - started)


@compiled_once
def compiled() -> SlotKernels:
    """Compiled at the first call."""
    return SlotKernels()


def _build(triple: str) -> ir.Module:
    module = ir.Module("obfuscatune_slot")
    module.triple = triple
    _add_post(module)
    _add_wait(module)
    return module


def _add_post(module: ir.Module) -> None:
    f = Function(module, "post", 1, host_shape(4), exported=True)
    slot = f.field(Post.SLOT)
    for word, key in ((Word.MATRIX, Post.MATRIX), (Word.ROWS, Post.ROWS), (Word.FROM, Post.FROM), (Word.TO, Post.TO)):
        f.write(f.field(key), slot, 8 * word)
    f.store_shared(f.field(Post.NUMBER), slot, 8 * Word.POSTED)
    f.write(f.load_shared(slot, 8 * Word.WATCHED), f.arguments[0], 8 * Post.WATCHED)
    f.builder.ret_void()


def _add_wait(module: ir.Module) -> None:
    """Whether anybody watches is looked at before the answer: a worker answers before it leaves."""
    f = Function(module, "wait", 1, host_shape(4), exported=True)
    b = f.builder
    slot, number = f.field(Wait.SLOT), f.field(Wait.NUMBER)
    state = f.local(I64, I64(State.PENDING))
    turns = f.local(I64, f.field(Wait.TURNS))
    head, waiting, done = (f.ir.append_basic_block(name) for name in ("head", "waiting", "done"))
    b.branch(head)
    b.position_at_end(head)
    unwatched = b.icmp_unsigned("!=", f.load_shared(slot, 8 * Word.WATCHED), I64(1))
    answered = b.icmp_unsigned("==", f.load_shared(slot, 8 * Word.ANSWERED), number)
    left = b.sub(b.load(turns, typ=I64), I64(1))
    b.store(left, turns)
    absent = b.select(unwatched, I64(State.UNWATCHED), I64(State.PENDING))
    b.store(b.select(answered, I64(State.ANSWERED), absent), state)
    over = b.or_(b.or_(answered, unwatched), b.icmp_signed("<=", left, I64(0)))
    b.cbranch(over, done, waiting)
    b.position_at_end(waiting)
    f.rest()
    b.branch(head)
    b.position_at_end(done)
    f.write(b.load(state, typ=I64), f.arguments[0], 8 * Wait.STATE)
    b.ret_void()
