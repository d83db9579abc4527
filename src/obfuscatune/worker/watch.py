"""A slot that is watched: requests for few rows, answered without a message for each (docs/adr/0012)."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obfuscatune.jit import team
from obfuscatune.wire.errors import MalformedMessage
from obfuscatune.wire.limits import MAX_SLOT_ROWS
from obfuscatune.wire.messages import ErrorCode
from obfuscatune.wire.shared_memory import SharedMemory
from obfuscatune.wire.slot import SLOT_BYTES, Word
from obfuscatune.worker.declined import Declined
from obfuscatune.worker.kernels import few_rows
from obfuscatune.worker.kernels.few_rows import Cut
from obfuscatune.worker.kernels.watch import End, Entry, Watch

AWAKE_SECONDS = 2e-3
"""A watch ends when nothing came for so long: several times what an enclave takes between two products."""
MOST_REQUESTS = 1 << 14
"""Of one watch: then the worker has a look whether it is to stop."""
_CALIBRATION_TURNS = 1 << 14


@dataclass(frozen=True)
class Watched:
    """What was done in a watch."""

    products: int
    seconds: float
    """In which it computed."""
    operations: int
    nbytes: int


def watch(memory: SharedMemory, slot_offset: int, matrices: Sequence[torch.Tensor], threads: int) -> Watched:
    """Answer what is posted in the slot, until nothing more is for a while, or the enclave wants that.

    Args:
        memory: shared with the enclave.
        slot_offset: of the slot in it.
        matrices: what requests may be about, by number; (p, q) each.
        threads: to compute on.

    Raises:
        MalformedMessage: the slot does not lie in the memory, or a request broke the rules.
        Declined: a matrix is none that the kernel multiplies by.
    """
    slot = memory.matrix(slot_offset, 1, SLOT_BYTES, torch.uint8)
    kernels = few_rows.compiled(torch.float32.itemsize)
    cuts = []
    for matrix in matrices:
        if matrix.dtype != torch.float32 or not matrix.is_contiguous() or matrix.shape[1] < kernels.shape.lanes:
            raise Declined(ErrorCode.SHAPE, "a slot takes float32 matrices with some dozen columns: send messages")
        cuts.append(Cut.of(matrix.shape[1], kernels.shape, _threads_for(matrix, threads)))
    scratch_bytes = max(cut.scratch_bytes(MAX_SLOT_ROWS, kernels.shape) for cut in cuts)
    few, _scratch = few_rows.prepared(scratch_bytes, threads)
    table = (ctypes.c_int64 * (Entry.LENGTH * len(cuts)))()
    for number, (matrix, cut) in enumerate(zip(matrices, cuts, strict=True)):
        at = number * Entry.LENGTH
        table[at + Entry.W] = matrix.data_ptr()
        table[at + Entry.INNER], table[at + Entry.COLUMNS] = matrix.shape
        table[at + Entry.STRIPS], table[at + Entry.PIECE] = cut.strips, cut.piece
        table[at + Entry.THREADS] = cut.threads
    job = _job(slot, kernels.few_rows, few)
    job[Watch.TURNS] = _turns(AWAKE_SECONDS)
    job[Watch.TABLE], job[Watch.MATRICES] = ctypes.addressof(table), len(cuts)
    job[Watch.MEMORY], job[Watch.MEMORY_BYTES] = memory.rest(0).data_ptr(), memory.size
    team.run(kernels.watch, ctypes.addressof(job), 1)
    if job[Watch.END] == End.BROKEN:
        raise MalformedMessage("what was posted in the slot is no request for rows of a matrix that is watched for")
    seconds = job[Watch.TICKS] / _ticks_per_second()
    return Watched(job[Watch.SERVED], seconds, job[Watch.OPERATIONS], job[Watch.ELEMENTS] * torch.float32.itemsize)


def _threads_for(matrix: torch.Tensor, threads: int) -> int:
    """Reading less than that of a matrix takes no longer than waking a thread."""
    return max(min(threads, matrix.nbytes // few_rows.BYTES_PER_THREAD), 1)


def _job(slot: torch.Tensor, kernel: int, few: ctypes.Array[ctypes.c_int64]) -> ctypes.Array[ctypes.c_int64]:
    job = (ctypes.c_int64 * Watch.LENGTH)()
    job[Watch.SLOT] = slot.data_ptr()
    job[Watch.SEEN] = int(slot.view(torch.int64)[0, Word.ANSWERED])
    job[Watch.REQUESTS] = MOST_REQUESTS
    job[Watch.FEW], job[Watch.FEW_ROWS], job[Watch.PARALLEL] = ctypes.addressof(few), kernel, team.parallel_address()
    return job


@functools.cache
def _turns(seconds: float) -> int:
    """How often a watch looks in so many seconds."""
    taken, _ = _calibrated()
    return max(int(_CALIBRATION_TURNS * seconds / taken), 1)


def _ticks_per_second() -> float:
    return _calibrated()[1]


@functools.cache
def _calibrated() -> tuple[float, float]:
    """Seconds of a watch of `_CALIBRATION_TURNS` at an empty slot, and ticks of the processor's clock in a second."""
    kernels = few_rows.compiled(torch.float32.itemsize)
    few, _scratch = few_rows.prepared(1, 1)
    slot = torch.zeros(1, SLOT_BYTES, dtype=torch.uint8)
    job = _job(slot, kernels.few_rows, few)
    job[Watch.TURNS] = _CALIBRATION_TURNS
    started = time.perf_counter()
    team.run(kernels.watch, ctypes.addressof(job), 1)
    taken = time.perf_counter() - started
    return taken, max(job[Watch.WHOLE] / taken, 1.0)
