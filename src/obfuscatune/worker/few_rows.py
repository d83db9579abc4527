"""X W for few rows X and a large W, in one pass over W: what decoding asks for.

A BLAS copies the matrix into another order first, which pays with many rows; with few it takes several times as long as
reading it (docs/adr/0011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune import native

FEWEST, MOST = 2, 128
"""Rows between which the kernel wins: of one alone BLAS makes no copy, and many are worth one."""


def applies_to(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `multiply` computes out (m, q) = rows (m, p) @ matrix (p, q), and faster than torch."""
    if not FEWEST <= rows.shape[0] <= MOST or matrix.device.type != "cpu":
        return False
    if not rows.dtype == out.dtype == matrix.dtype or matrix.dtype not in (torch.float32, torch.float64):
        return False
    table = native.kernels(matrix.itemsize)
    if table is None or matrix.shape[1] < table.strip:
        return False
    return all(x.is_contiguous() for x in (rows, matrix, out))


def multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix, for what `applies_to` is true of."""
    table = native.kernels(matrix.itemsize)
    if table is None:
        torch.mm(rows, matrix, out=out)
        return
    addresses = (x.data_ptr() for x in (rows, matrix, out))
    table.multiply_few_rows(native.FewRows(*addresses, rows.shape[0], *matrix.shape, torch.get_num_threads()))
