"""Products on a CUDA device, several at a time: rows go up while the last product is computed and another comes down.

    up        rows      host -> device           from registered memory, by the copy engine
    compute   product   on the device            waits for its rows
    down      product   device -> host           waits for its product, on the other copy engine

Three streams: were rows and products copied on one, rows of the next request would wait behind the last product.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from obfuscatune.backend.underway import OnStreams


class Streams:
    """The streams of one device. Not safe from several threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._compute, self._down = (torch.cuda.Stream(device) for _ in range(3))

    def start(self, rows: Tensor, matrix: Tensor, out: Tensor, product: Callable[[Tensor], Tensor]) -> OnStreams:
        """Have `product` of the rows written into `out`; nothing is waited for where both lie in registered memory.

        Args:
            rows: on the CPU.
            matrix: that it is a product with; kept until it is done.
            out: on the CPU, contiguous, of the product's dtype.
            product: launches it on the device, of the rows there.
        """
        with torch.cuda.device(self._device), torch.cuda.stream(self._up):
            there = rows.to(self._device, non_blocking=True)
            self._compute.wait_stream(self._up)
            with torch.cuda.stream(self._compute), full_precision():
                result = product(there)
            self._down.wait_stream(self._compute)
            with torch.cuda.stream(self._down):
                out.copy_(result, non_blocking=True)
                done = self._down.record_event()
        return OnStreams(done, (rows, there, matrix, result, out))


_PRECISE: dict[str, str | bool] = {
    "fp32_precision": "ieee",
    "allow_fp16_accumulation": False,
    "allow_fp16_reduced_precision_reduction": False,
    "allow_bf16_reduced_precision_reduction": False,
}
"""Settings of `torch.backends.cuda.matmul` with which a product rounds as its dtype says."""
_changing = threading.Lock()
"""Held by whoever changed the settings and has not put them back."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, products are launched that round as their dtype says: parts of a sum are not rounded to 16 bits, and
    float32 is not cut to TF32. Verification would take either for a lie.

    These are settings of the process, which somebody else may have chosen for other work, by torch's older functions or
    by its newer ones: those that are coarse are put back.
    """
    with _changing:
        matmul = torch.backends.cuda.matmul
        coarse = {name: value for name in _PRECISE if (value := getattr(matmul, name)) in (True, "tf32")}
        for name in coarse:
            setattr(matmul, name, _PRECISE[name])
        try:
            yield
        finally:
            for name, value in coarse.items():
                setattr(matmul, name, value)
