"""Few rows times a large matrix, in one pass over the matrix: what decoding asks of a worker.

    source     the kernel, as LLVM IR
    watch      one that takes what to multiply from shared memory
    few_rows   what it is given, and where it applies

A BLAS copies the matrix into another order first, which pays with many rows; with few it takes several times as long
as reading the matrix. torch computes all else, and where no kernels can be compiled (docs/adr/0011).
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

FEWEST, MOST = 2, 128
"""Rows between which the kernel wins: of one alone BLAS makes no copy, and many are worth one."""


def apply_to(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `few_rows.multiply` computes out (m, q) = rows (m, p) @ matrix (p, q), and faster than torch."""
    if not FEWEST <= rows.shape[0] <= MOST or matrix.device.type != "cpu" or not are_there():
        return False
    if matrix.dtype not in (torch.float32, torch.float64) or not (matrix.is_contiguous() and rows.is_contiguous()):
        return False
    from obfuscatune.worker.kernels.few_rows import strip_columns

    return rows.dtype == out.dtype == matrix.dtype and matrix.shape[1] >= strip_columns(matrix.itemsize)


@functools.cache
def may_be_there() -> bool:
    """Whether it is worth trying to compile; without doing it, which takes a while."""
    return importlib.util.find_spec("llvmlite") is not None and os.environ.get("OBFUSCATUNE_KERNELS", "") != "0"


@functools.cache
def are_there() -> bool:
    """Whether kernels can be compiled and run in this process; found out once."""
    try:
        from obfuscatune.jit.engine import can_compile
        from obfuscatune.worker.kernels.few_rows import strip_columns
    except ImportError:  # no llvmlite
        return False
    return can_compile(lambda: strip_columns(4))
