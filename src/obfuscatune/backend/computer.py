"""All that is computed outside of the enclave: rows @ W*, or rows @ W*ᵀ; and whose turn it is to compute.

Few rows, as decoding has them, go through a kernel that reads W* once. A BLAS copies the matrix into another order
first, which pays with many rows; with few it takes several times as long as reading it (docs/adr/0011).

A matrix may be coarser than what is computed in: float32 for rows in float64, which one-time masks need, or 16 bits
for a processor that multiplies in float32. Few rows in float64 go through the same kernel, which widens float32 as it
reads. For all others the matrix is widened strip by strip, into memory that is used again.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from obfuscatune import native
from obfuscatune.backend.streams import Streams, full_precision
from obfuscatune.backend.underway import Deferred, Underway
from obfuscatune.process import begin_anew_in_children

FEWEST, MOST = 2, 128
"""Rows between which the kernel wins: of one alone BLAS makes no copy, and many are worth one."""
MOST_WIDENED = 128
"""Rows up to which the kernel wins where it widens the matrix; from one on, since BLAS needs a copy for that too."""


def few_rows_apply(rows: Tensor, matrix: Tensor, out: Tensor) -> bool:
    """Whether `multiply_few_rows` computes out (m, q) = rows (m, p) @ matrix (p, q), and faster than torch."""
    if rows.dtype != out.dtype or rows.dtype not in (torch.float32, torch.float64) or matrix.device.type != "cpu":
        return False
    if matrix.dtype == rows.dtype:
        fewest, most = FEWEST, MOST
    elif matrix.dtype == torch.float32:
        fewest, most = 1, MOST_WIDENED
    else:
        return False
    table = native.kernels(rows.itemsize)
    if not fewest <= rows.shape[0] <= most or table is None or matrix.shape[1] < table.strip:
        return False
    return rows.is_contiguous() and matrix.is_contiguous() and out.stride(1) == 1


def multiply_few_rows(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = rows @ matrix, for what `few_rows_apply` is true of."""
    table = native.kernels(rows.itemsize)
    if table is None:
        torch.mm(rows, matrix.to(rows.dtype), out=out)
        return
    addresses = (x.data_ptr() for x in (rows, matrix, out))
    sizes = rows.shape[0], *matrix.shape, out.stride(0)
    table.multiply_few_rows(native.FewRows(*addresses, *sizes, torch.get_num_threads(), matrix.itemsize))


WIDENED_ELEMENTS = 1 << 22
"""Of a matrix that are widened at a time: 32 MiB in float64. BLAS reads all rows again for each of them."""


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
        self._streams = Streams(device) if device.type == "cuda" else None
        begin_anew_in_children(self)

    def begin_in_child(self) -> None:
        """See `process.Forkable`. On a CUDA device nothing can be computed there."""
        self._lock = threading.Lock()  # the parent's may have been held by a thread that is not here

    def adopt(self, matrix: Tensor) -> Tensor:
        """A received (p, q) matrix as it is kept; the same memory when neither device nor dtype change.

        Raises:
            RuntimeError: the device has no room for it (torch.OutOfMemoryError), or failed.
        """
        kept = matrix.to(device=self.device, dtype=self.dtype or matrix.dtype)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # products are computed on another stream
        return kept

    @contextmanager
    def turn(self) -> Iterator[torch.device]:
        """The device, for one computation alone. Nothing in it is differentiated by torch."""
        precisely = full_precision() if self.device.type == "cuda" else nullcontext()
        with self._lock, torch.inference_mode(), precisely:
            yield self.device

    def multiply(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
        """`start`, and wait until it is done."""
        self.start(rows, matrix, out, transpose=transpose).wait(math.inf)

    def start(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> Underway:
        """Have the product written into `out`, in its dtype: computed in float64 where rows or matrix are float64.

        Neither rows nor `out` may be touched until it is done. On the CPU, whoever waits for it computes it.

        Args:
            rows: (m, p), or (m, q) when `transpose`; on the CPU.
            matrix: (p, q), as it was adopted.
            out: (m, q), or (m, p) when `transpose`; contiguous, on the CPU.
            transpose: multiply by the transpose.

        Raises:
            RuntimeError: the device has no room for rows and product (torch.OutOfMemoryError), or failed.
        """
        if self._streams is None:
            return Deferred(functools.partial(self._compute, rows, matrix, out, transpose))

        def product(there: Tensor) -> Tensor:
            return self._product(there, matrix, None, out.dtype, transpose)

        with self._lock, torch.inference_mode():
            return self._streams.start(rows, matrix, out, product)

    def _compute(self, rows: Tensor, matrix: Tensor, out: Tensor, transpose: bool) -> None:
        """The product, on the CPU."""
        with self._lock, torch.inference_mode():
            product = self._product(rows, matrix, out, out.dtype, transpose)
            if product is not out:
                out.copy_(product)

    def _product(
        self, rows: Tensor, matrix: Tensor, out: Tensor | None, out_dtype: torch.dtype, transpose: bool
    ) -> Tensor:
        """The product (m, q) of rows on the matrix's device; in `out` where it is computed in that dtype."""
        dtype = self._dtype_for(rows, matrix)
        rows = rows.to(dtype)
        if out is None or dtype != out_dtype:
            out = torch.empty(len(rows), matrix.shape[0 if transpose else 1], dtype=dtype, device=rows.device)
        if matrix.dtype == dtype or (not transpose and few_rows_apply(rows, matrix, out)):
            _multiply(rows, matrix, out, transpose=transpose)
        else:
            self._multiply_widened(rows, matrix, out, transpose=transpose)
        return out.to(out_dtype)

    def _dtype_for(self, rows: Tensor, matrix: Tensor) -> torch.dtype:
        """What is computed in: float64 where either is, else as the matrix is kept, or float32 where that is slow."""
        if torch.float64 in (rows.dtype, matrix.dtype):
            return torch.float64
        return matrix.dtype if self.device.type != "cpu" or has_units_for(matrix.dtype) else torch.float32

    def _multiply_widened(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
        """The product with a matrix that is coarser than `rows` and `out`: columns of the product one strip at a time.

        All strips of the matrix take the same memory, since fresh pages take longer than widening, and no more than
        that: a matrix of any size must not have the worker hold twice as much again beside its quota.
        """
        inner, outer = matrix.shape[::-1] if transpose else matrix.shape
        width = max(1, WIDENED_ELEMENTS // inner)
        for first in range(0, outer, width):
            last = min(first + width, outer)
            strip = matrix[first:last] if transpose else matrix[:, first:last]
            if self._wide.dtype != rows.dtype or self._wide.numel() < strip.numel():
                self._wide = torch.empty(strip.numel(), dtype=rows.dtype, device=self.device)
            wide = self._wide[: strip.numel()].view(strip.shape).copy_(strip)
            _multiply(rows, wide, out[:, first:last], transpose=transpose)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
    if not transpose and few_rows_apply(rows, matrix, out):
        multiply_few_rows(rows, matrix, out)
    else:
        torch.mm(rows, matrix.t() if transpose else matrix, out=out)


@functools.cache
def has_units_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in that dtype, and may; without, torch takes 40 times as long as in float32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return True
    asked = getattr(torch.ops.mkldnn, known[dtype], None)
    return bool(torch.backends.mkldnn.enabled) and asked is not None and bool(asked())
