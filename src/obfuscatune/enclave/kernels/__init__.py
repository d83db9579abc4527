"""Rotation and mixing on the CPU, each in one pass: compiled kernels in place of a dozen operations of torch.

    source     the kernels: what they compute, panel by panel
    few        one more, for few rows
    compiled   these in memory, once in each process, by `obfuscatune.jit`
    mixing     the secrets of a crossing of few rows, as they are handed over
    job        what a kernel is given: tables, packed factors, scratch memory
    rotation   x R for a structured R
    rows       A [x; N], and back
    deviates   N, from random words
    images     what products are checked by

torch's operations stay: where these kernels do not apply, and as what they are tested against. docs/adr/0010 says why
they are written this way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.compiled import Compiled


def code_for(x: Tensor) -> Compiled | None:
    """The kernels that apply to x (n, p), or None where torch is to compute.

    They take float32 and float64 on the CPU, rows that are contiguous and at least as long as a panel's, and nothing
    through which autograd is to find its way.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not are_there():
        return None
    if x.dim() != 2 or x.shape[0] < 1 or x.stride(1) != 1 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    from obfuscatune.enclave.kernels.compiled import compiled

    code = compiled(x.itemsize)
    return code if x.shape[1] >= code.shape.lanes else None


def code_for_deviates() -> Callable[[NDArray[np.uint32], int], NDArray[np.float32]] | None:
    """`deviates.from_words`, or None where numpy is to compute."""
    if not are_there():
        return None
    from obfuscatune.enclave.kernels.deviates import from_words

    return from_words


@functools.cache
def are_there() -> bool:
    """Whether kernels can be compiled and run in this process; found out once."""
    try:
        from obfuscatune.enclave.kernels.compiled import compiled
        from obfuscatune.jit.engine import can_compile
    except (ImportError, OSError):  # no llvmlite, or none that can be loaded here
        return False
    return can_compile(lambda: compiled(4))
