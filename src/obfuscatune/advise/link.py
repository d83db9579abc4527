"""How fast a worker is, by real requests: its link, its products, and what the enclave itself does for a request.

    small and thin matrices  -> latency, and bandwidth each way
    a protected layer        -> the enclave's own part (rotate, mix, mask, verify), and how long it waits for products

The matrices are random, and every answer is held against the product that the enclave computes. Clocks are the
enclave's: nothing is taken from the worker but its answers.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from obfuscatune.advise.enclave import FEW_ROWS
from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protection import Masking, Protection
from obfuscatune.errors import WrongProduct

Progress = Callable[[str], None]
NARROW, WIDE = 512, 2048
"""Widths of the layers that are timed; between and beyond, times are taken to go with the bytes and the operations."""
MOST_ROWS = 1024
MOST_MATRICES = 8
"""Of width `WIDE` that few rows are multiplied by in turn: together more than a cache holds."""
UPLOAD_SECONDS = 1.5
"""That uploading these may take, by the bandwidth that was measured; there are fewer of them on a slow link."""
_THIN, _LONG, _ROWS = 4, 8192, 128
_LEAST_ROUNDS, _MOST_ROUNDS, _MOST_SECONDS = 5, 50, 0.5
_PATIENCE_SECONDS = 10.0
"""After which even the least number of rounds is cut short: a worker may be slow, or want to look so."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest element; a product that is off by more is none. What rounds in 16 bits errs by percents."""


@dataclass(frozen=True)
class Link:
    """The way to a worker and back."""

    latency_seconds: float
    """Of a request of one short row, the worker's waking up and computing included."""
    up_seconds_a_byte: float
    down_seconds_a_byte: float

    def seconds(self, up: float, down: float) -> float:
        """Of so many bytes each way, without the latency."""
        return up * self.up_seconds_a_byte + down * self.down_seconds_a_byte


def measure_link(client: WorkerLink, dtype: torch.dtype) -> Link:
    """About a second.

    Raises:
        WrongProduct: an answer is not the product.
        WireError: the worker cannot be reached, or refuses.
    """
    latency = _request_seconds(client, 1, 64, 64, dtype)
    nbytes = _ROWS * (_LONG - _THIN) * dtype.itemsize
    up, down = (_request_seconds(client, _ROWS, *shape, dtype) for shape in ((_LONG, _THIN), (_THIN, _LONG)))
    return Link(latency, max(up - latency, 0.0) / nbytes, max(down - latency, 0.0) / nbytes)


def _request_seconds(client: WorkerLink, rows: int, p: int, q: int, dtype: torch.dtype) -> float:
    """Median time of a request of rows (rows, p) for a random matrix (p, q)."""
    matrix, matrix_id = torch.randn(p, q).to(dtype), secrets.token_bytes(16)
    client.store(matrix_id, lambda: matrix, shape=(p, q), dtype=dtype, tensor=matrix)
    x = client.allocate(rows, p, dtype)
    own = torch.randn(rows, p).to(dtype)
    x.copy_(own)
    answer: list[Tensor] = []

    def ask() -> None:
        answer[:] = [client.submit(matrix_id, x, transpose=False, known_finite=True).result()]

    seconds = statistics.median(_timed(ask))
    _check(answer[0].double().clone(), own.double() @ matrix.double(), dtype)
    client.forget(matrix_id)
    return seconds


def _timed(work: Callable[[], None]) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    work()
    seconds: list[float] = []
    while len(seconds) < _MOST_ROUNDS and sum(seconds) < (
        _PATIENCE_SECONDS if len(seconds) < _LEAST_ROUNDS else _MOST_SECONDS
    ):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def _check(product: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises WrongProduct unless they are one, but for rounding."""
    error = float((product - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE[dtype]:
        raise WrongProduct(f"the worker's product of a random matrix is off by {error:.2g} of its largest element")


@dataclass(frozen=True)
class RequestTimes:
    """How long requests of a certain number of rows take under a profile.

    Attributes:
        own_seconds, own_seconds_a_byte: the enclave's own part: for each request, and for each byte of its rows and
            products as they cross.
        seconds_an_element: of the worker's product, for each element of its matrix and each row that is sent.
        mask_seconds_an_element: likewise of waiting for the masks' products, the other way to get there included.
    """

    own_seconds: float
    own_seconds_a_byte: float
    seconds_an_element: float
    mask_seconds_an_element: float = 0.0

    @property
    def worker_gflops(self) -> float:
        """10⁹ operations a second of the worker's products."""
        return 2e-9 / self.seconds_an_element


class _Block(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False, dtype=dtype)


class _Layers(nn.Module):
    """Square layers, one a block, as `protect` finds them."""

    protection: Protection
    """Once it is protected."""

    def __init__(self, width: int, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, dtype) for _ in range(count))

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Through one of them."""
        y: Tensor = self.blocks[index].get_submodule("proj")(x)
        return y


@dataclass(frozen=True)
class _Round:
    """Seconds of one request."""

    own: float
    waited: float
    masks: float


def measure_requests(
    client: WorkerLink,
    mask_client: WorkerLink | None,
    link: Link,
    profile: Profile,
    rows: int,
    sent: int,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    *,
    backward: bool,
) -> RequestTimes:
    """Time requests of `rows` rows, of which `sent` cross, through protected layers of two widths; some seconds.

    With `backward`, forward and backward alike.

    Raises:
        WrongProduct: an answer is not the product.
        WireError: a worker cannot be reached, or refuses.
    """
    timed = min(rows, MOST_ROWS)
    sent = sent if timed == rows else sent * timed // rows
    matrix_bytes = WIDE * WIDE * profile.crossing_dtype(dtype).itemsize
    affordable = UPLOAD_SECONDS / max(matrix_bytes * link.up_seconds_a_byte, 1e-9)
    copies = max(1, min(MOST_MATRICES, int(affordable))) if rows <= FEW_ROWS else 1
    narrow, wide = (
        _layer_times(client, mask_client, profile, timed, width, count, dtype, backward=backward)
        for width, count in ((NARROW, 1), (WIDE, copies))
    )
    nbytes = {width: 2 * sent * width * wire_dtype.itemsize for width in (NARROW, WIDE)}
    a_byte = max((wide.own - narrow.own) / (nbytes[WIDE] - nbytes[NARROW]), 0.0)
    each = max(wide.own - nbytes[WIDE] * a_byte, 0.0)
    elements, crossed = sent * WIDE * WIDE, link.latency_seconds + link.seconds(nbytes[WIDE] / 2, nbytes[WIDE] / 2)
    computed = max(wide.waited - crossed, 0.05 * wide.waited)  # what was measured of link and worker apart may disagree
    return RequestTimes(each, a_byte, computed / elements, wide.masks / elements)


def _layer_times(
    client: WorkerLink,
    mask_client: WorkerLink | None,
    profile: Profile,
    rows: int,
    width: int,
    count: int,
    dtype: torch.dtype,
    *,
    backward: bool,
) -> _Round:
    """Times of a request through protected layers (width, width), which take turns: of the median round."""
    layers = _Layers(width, count, dtype)
    first = next(layers.parameters()).detach().double().clone()
    protection = protect(
        layers, client, profile, base="closed", mask_worker=mask_client, masking=Masking(memory_bytes=0), first_blocks=0
    ).protection
    try:
        x = torch.randn(rows, width, dtype=dtype, requires_grad=backward)
        g = torch.ones_like(x)
        turn = cycle(range(count))
        rounds: list[_Round] = []

        def ask() -> None:
            before, masked = client.stats.seconds_waiting, _mask_seconds(protection)
            started = time.perf_counter()
            y = layers(x, next(turn))
            if backward:
                torch.autograd.grad(y, x, g)
            passed = time.perf_counter() - started
            waited, masks = client.stats.seconds_waiting - before, _mask_seconds(protection) - masked
            requests = 2 if backward else 1
            own = max(passed - waited - masks, 0.0)
            rounds.append(_Round(own / requests, waited / requests, masks / requests))

        with nullcontext() if backward else torch.inference_mode():
            _timed(ask)
            last = layers(x, 0).detach()
        _check(last.double(), x.detach().double() @ first.T, profile.crossing_dtype(dtype))
    finally:
        for one in protection.offloaded:
            one.crossing.product.drop()
    counted = rounds[count:] if len(rounds) > count else rounds
    counted.sort(key=lambda it: it.own + it.waited + it.masks)
    return counted[len(counted) // 2]


def _mask_seconds(protection: Protection) -> float:
    return 0.0 if protection.masks is None else protection.masks.stats.seconds_waiting
