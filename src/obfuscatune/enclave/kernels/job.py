"""What the kernels' users share: packed factors, tables, scratch memory, and a job given to torch's threads."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from obfuscatune.enclave.kernels.compiled import Compiled
from obfuscatune.enclave.kernels.source import Job
from obfuscatune.jit import team

ELEMENTS_PER_THREAD = 1 << 15
"""Fewer are not worth waking a thread for; torch's operations use the same bound."""
_ALIGNMENT = 64
_own = threading.local()


def run(kernel: int, fields: Mapping[Job, int], elements: int, scratch_bytes: int) -> float:
    """Run a job over a matrix of so many elements on torch's threads; the sum of what its threads saw."""
    threads = max(min(torch.get_num_threads(), fields[Job.PANELS], elements // ELEMENTS_PER_THREAD), 1)
    per_thread = -(-scratch_bytes // _ALIGNMENT) * _ALIGNMENT
    sums = (ctypes.c_double * threads)()
    job = (ctypes.c_int64 * Job.LENGTH)()
    for key, value in fields.items():
        job[key] = value
    job[Job.SUMS] = ctypes.addressof(sums)
    job[Job.SCRATCH], job[Job.SCRATCH_BYTES] = scratch(per_thread * threads), per_thread
    team.run(kernel, ctypes.addressof(job), threads)
    return sum(sums)


def packed(factor: Tensor, code: Compiled) -> Tensor:
    """A left factor (s, s), in the kernels' dtype, as the inner loop reads it: in blocks of rows, each transposed."""
    return factor.reshape(-1).index_select(0, _packing(factor.shape[0], code.shape.height))


@functools.cache
def _packing(size: int, height: int) -> Tensor:
    blocks = -(-size // height)
    low, taller = divmod(size, blocks)
    numbers = torch.arange(size * size).view(size, size)
    parts = numbers.split([low + 1] * taller + [low] * (blocks - taller))
    return torch.cat([part.T.reshape(-1) for part in parts])


@functools.lru_cache(maxsize=256)
def multiples(count: int, step: int) -> Tensor:
    """0, step, 2 step …, int64 (count,). Not to be changed."""
    return torch.arange(count) * step


def scratch(size: int) -> int:
    """Address of memory that is this Python thread's until it asks again; aligned."""
    memory: Tensor | None = getattr(_own, "memory", None)
    if memory is None or memory.numel() < size + _ALIGNMENT:
        memory = _own.memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    return -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
