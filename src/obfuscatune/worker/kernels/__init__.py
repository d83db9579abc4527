"""What takes a worker less time than one product of torch's, which computes the rest; and all, where nothing compiles.

Few rows times a large matrix, in one pass over the matrix: what decoding asks for. A BLAS copies the matrix into
another order first, which pays with many rows; with few it takes several times as long as reading it (docs/adr/0011).

    source     the kernel, as LLVM IR
    few_rows   what it is given, and where it applies

Many rows, by BLAS, in parts that threads take one after another (docs/adr/0013).

    blas       where BLAS's product lies
    parts      the kernel that calls it
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

FEWEST, MOST = 2, 128
"""Rows between which the kernel wins: of one alone BLAS makes no copy, and many are worth one."""
FEWEST_OPERATIONS = 1 << 25
"""Of a product that is handed out in parts: half a millisecond of one core."""
_DTYPES = (torch.float32, torch.float64)
log = logging.getLogger(__name__)


def apply_to(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `few_rows.multiply` computes out (m, q) = rows (m, p) @ matrix (p, q), and faster than torch."""
    if not FEWEST <= rows.shape[0] <= MOST or matrix.device.type != "cpu" or not are_there():
        return False
    if matrix.dtype not in _DTYPES or not (matrix.is_contiguous() and rows.is_contiguous()):
        return False
    from obfuscatune.worker.kernels.few_rows import strip_columns

    return rows.dtype == out.dtype == matrix.dtype and matrix.shape[1] >= strip_columns(matrix.itemsize)


def apply_in_parts(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `parts.multiply` computes out = rows @ matrix, or rows @ matrixᵀ, and is worth more than one product."""
    operations = 2 * out.numel() * rows.shape[1]
    if operations < FEWEST_OPERATIONS or torch.get_num_threads() == 1 or matrix.device.type != "cpu":
        return False
    if matrix.dtype not in _DTYPES or not rows.dtype == out.dtype == matrix.dtype:
        return False
    return all(x.is_contiguous() for x in (rows, matrix, out)) and are_there() and can_call_blas()


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
    except (ImportError, OSError):  # no llvmlite, or none that can be loaded here
        return False
    return can_compile(lambda: strip_columns(4))


@functools.cache
def can_call_blas() -> bool:
    """Whether BLAS's product can be called by a kernel, and computes what torch does; found out once."""
    from obfuscatune.worker.kernels import parts

    try:
        return all(_computes(parts.multiply, *case) for case in itertools.product(_DTYPES, (False, True)))
    except (OSError, AttributeError) as reason:
        log.info("products are left to torch in one piece: %s", reason)
        return False


def _computes(multiply: Callable[..., None], dtype: torch.dtype, transpose: bool) -> bool:
    matrix = torch.arange(15.0, dtype=dtype).view(3, 5)
    factor = matrix.T if transpose else matrix
    rows = torch.arange(2.0 * factor.shape[0], dtype=dtype).view(2, -1)
    expected = rows @ factor  # whole numbers: exact
    multiply(rows, matrix, out := torch.empty_like(expected), transpose=transpose)
    return torch.equal(out, expected)
