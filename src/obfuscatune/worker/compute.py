"""All that a worker computes: rows @ W*, or rows @ W*^T; and whose turn it is to compute."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from obfuscatune.worker import few_rows


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
                wide = torch.empty(out.shape)
                self._multiply(rows.float(), self._widened(matrix), wide, transpose=transpose)
                out.copy_(wide)
            else:
                self._multiply(rows, matrix, out, transpose=transpose)

    def _multiply(self, rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, transpose: bool) -> None:
        if not transpose and few_rows.applies_to(rows, matrix, out):
            few_rows.multiply(rows, matrix, out)
        else:
            factor = matrix.t() if transpose else matrix
            rows = rows.to(device=self.device, dtype=matrix.dtype)
            if self.device.type == "cpu" and out.dtype == matrix.dtype:
                torch.mm(rows, factor, out=out)
            else:
                out.copy_(torch.mm(rows, factor))

    def _widened(self, matrix: torch.Tensor) -> torch.Tensor:
        """A 16-bit matrix in float32, in memory that the next one takes: fresh pages take longer than the product."""
        if self._wide.numel() < matrix.numel():
            self._wide = torch.empty(matrix.numel())
        return self._wide[: matrix.numel()].view(matrix.shape).copy_(matrix)


@functools.cache
def has_units_for(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in that dtype; without, torch takes 40 times as long as in float32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known:
        return True
    asked = getattr(torch.ops.mkldnn, known[dtype], None)
    return asked is not None and bool(asked())
