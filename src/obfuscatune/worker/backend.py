"""All that a worker computes: rows @ W*, or rows @ W*ᵀ; and whose turn it is to compute.

Few rows, as decoding has them, go through a kernel that reads W* once. A BLAS copies the matrix into another order
first, which pays with many rows; with few it takes several times as long as reading it (docs/adr/0011).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from obfuscatune import native

FEWEST, MOST = 2, 128
"""Rows between which the kernel wins: of one alone BLAS makes no copy, and many are worth one."""


def few_rows_apply(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `multiply` computes out (m, q) = rows (m, p) @ matrix (p, q), and faster than torch."""
    if not FEWEST <= rows.shape[0] <= MOST or matrix.device.type != "cpu":
        return False
    if not rows.dtype == out.dtype == matrix.dtype or matrix.dtype not in (torch.float32, torch.float64):
        return False
    table = native.kernels(matrix.itemsize)
    if table is None or matrix.shape[1] < table.strip:
        return False
    return all(x.is_contiguous() for x in (rows, matrix, out))


def multiply_few_rows(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix, for what `applies_to` is true of."""
    table = native.kernels(matrix.itemsize)
    if table is None:
        torch.mm(rows, matrix, out=out)
        return
    addresses = (x.data_ptr() for x in (rows, matrix, out))
    table.multiply_few_rows(native.FewRows(*addresses, rows.shape[0], *matrix.shape, torch.get_num_threads()))


WIDENED_ELEMENTS = 1 << 24
"""Of a 16-bit matrix that are in float32 at a time: 64 MiB."""


class Computer:
    """Multiplies on one device, one product at a time: two at once would share the same cores and both be late."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """A computer that nobody uses yet.

        Args:
            device: where matrices are kept and products computed.
            dtype: in which; None is as they were sent.
        """
        self.device = device
        self.dtype = dtype
        self._lock = threading.Lock()
        self._wide = torch.empty(0)

    def adopt(self, matrix: torch.Tensor) -> torch.Tensor:
        """A received (p, q) matrix as it is kept; the same memory when neither device nor dtype change."""
        return matrix.to(device=self.device, dtype=self.dtype or matrix.dtype)

    @contextmanager
    def turn(self) -> Iterator[torch.device]:
        """The device, for one computation alone. Nothing in it is differentiated by torch."""
        with self._lock, torch.inference_mode():
            yield self.device

    def multiply(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool) -> None:
        """Write the product into `out`, in its dtype.

        Args:
            rows: (m, p), or (m, q) when `transpose`; on the CPU.
            matrix: (p, q), on this computer's device.
            out: (m, q), or (m, p) when `transpose`; contiguous, on the CPU.
            transpose: multiply by the transpose.
        """
        with self._lock, torch.inference_mode():
            if matrix.device.type == "cpu" and not has_units_for(matrix.dtype):
                self._multiply_widened(rows.float(), matrix, out, transpose=transpose)
            else:
                self._multiply(rows, matrix, out, transpose=transpose)

    def _multiply(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool) -> None:
        if not transpose and few_rows_apply(rows, matrix, out):
            multiply_few_rows(rows, matrix, out)
        else:
            factor = matrix.t() if transpose else matrix
            rows = rows.to(device=self.device, dtype=matrix.dtype)
            if self.device.type == "cpu" and out.dtype == matrix.dtype:
                torch.mm(rows, factor, out=out)
            else:
                out.copy_(torch.mm(rows, factor))

    def _multiply_widened(
        self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool
    ) -> None:
        """The product with a 16-bit matrix in float32, rounded once: a strip of the matrix's rows after the other.

        All strips take the same memory, since fresh pages take longer than the product, and no more than that: a
        matrix of any size must not have the worker hold twice as much again beside its quota.
        """
        total = torch.zeros(out.shape)
        first = 0
        for strip in matrix.split(max(1, WIDENED_ELEMENTS // matrix.shape[1])):
            if self._wide.numel() < strip.numel():
                self._wide = torch.empty(strip.numel())
            wide = self._wide[: strip.numel()].view(strip.shape).copy_(strip)
            last = first + strip.shape[0]
            if transpose:
                self._multiply(rows, wide, part := torch.empty(rows.shape[0], strip.shape[0]), transpose=True)
                total[:, first:last] = part
            else:
                self._multiply(rows[:, first:last].contiguous(), wide, part := torch.empty(out.shape), transpose=False)
                total += part
            first = last
        out.copy_(total)


@functools.cache
def has_units_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in that dtype; without, torch takes 40 times as long as in float32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return True
    asked = getattr(torch.ops.mkldnn, known[dtype], None)
    return asked is not None and bool(asked())
