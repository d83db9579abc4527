"""All that a worker computes: rows @ W*, or rows @ W*^T; and whose turn it is to compute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from obfuscatune.worker import kernels


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
        factor = matrix.t() if transpose else matrix
        with self._lock, torch.inference_mode():
            if not transpose and kernels.apply_to(rows, matrix, out):
                from obfuscatune.worker.kernels import few_rows

                few_rows.multiply(rows, matrix, out)
                return
            if kernels.apply_in_parts(rows, matrix, out):
                from obfuscatune.worker.kernels import parts

                parts.multiply(rows, matrix, out, transpose=transpose)
                return
            rows = rows.to(device=self.device, dtype=matrix.dtype)
            if self.device.type == "cpu" and out.dtype == matrix.dtype:
                torch.mm(rows, factor, out=out)
            else:
                out.copy_(torch.mm(rows, factor))
