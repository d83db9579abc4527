"""A worker that answers with whatever numbers might confuse the check: refused at the first product, and for good."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune import RootKey
from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import DENSE_BELOW
from obfuscatune.enclave.product import Held, OffloadedProduct
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protection import Clients, Protection
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import BadReply, WrongProduct
from tests.enclave.client.peers import MemoryWorker

KEY = RootKey(b"n" * 32)
ID = b"1" * 16
P, Q = 64, 72
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROFILES = ("private:verify=1", "paper:verify=1")
ROWS = {"one row": 1, "few": 5, "many": 3 * DENSE_BELOW}
Tampering = Callable[[Tensor], object]


def large(value: float) -> Tampering:
    """Zeros, and one number that is as large as that, or as the dtype allows."""

    def tamper(out: Tensor) -> None:
        out.zero_()[-1, -1] = min(value, torch.finfo(out.dtype).max)

    return tamper


def scaled(out: Tensor) -> None:
    out[0] *= 2


def shifted_by_its_norm(out: Tensor) -> None:
    """Every row is made as large as may be, in the hope that this is tolerated."""
    out.copy_(torch.full_like(out, torch.finfo(out.dtype).max / out.shape[1]))


TAMPERING: dict[str, Tampering] = {
    "zeros": Tensor.zero_,
    "signed zeros": lambda out: out.copy_(torch.copysign(torch.zeros_like(out), out)),
    "zeros and one 2e19": large(2e19),
    "zeros and one 3e38": large(3e38),
    "zeros and one as large as it can be": large(float("inf")),
    "denormals": lambda out: out.fill_(torch.finfo(out.dtype).smallest_normal / 2),
    "one row scaled": scaled,
    "all of them large": shifted_by_its_norm,
    "infinity": lambda out: out.__setitem__((0, 0), float("inf")),
    "minus infinity, and infinity": lambda out: out[:2].copy_(torch.full_like(out[:2], float("inf"))).neg_(),
    "NaN": lambda out: out.__setitem__((-1, -1), float("nan")),
}


@functools.cache
def protected(dtype: torch.dtype) -> tuple[StructuredTransform, StructuredTransform, Tensor]:
    """R_in, R_out and W_star (P, Q)."""
    R_in, R_out = (StructuredTransform(dim, KEY.stream("R", dim)) for dim in (P, Q))
    W = KEY.stream("W").normal(P, Q) / P**0.5
    return R_in, R_out, R_out.weight_right(R_in.weight_left(W)).to(dtype)


class Offloaded:
    """A product offloaded under a profile, and its worker, which tampers from the first on."""

    def __init__(self, profile: str, dtype: torch.dtype, tamper: Tampering | None = None) -> None:
        self.worker = MemoryWorker(quota_bytes=2**22)
        self.client = WorkerClient(self.worker, retry=RetryPolicy(attempts=2, backoff_s=0.0))
        R_in, R_out, W_star = protected(dtype)
        self.client.store(ID, lambda: W_star, shape=(P, Q), dtype=dtype)
        resolved = resolve(profile)
        mixer = Protection.start(Clients(self.client), resolved, KEY).mixer
        self.verifier = Verifier(W_star, SecretStream.fresh(), resolved.verify)
        self.product = OffloadedProduct(self.client, Held(ID, verifier=self.verifier), R_in, R_out, mixer)
        self.dtype = dtype
        if tamper is not None:
            self.tamper(tamper)

    def tamper(self, tamper: Tampering) -> None:
        """With every product from now on."""
        computer = self.worker.answerer.computer
        honest = computer.multiply

        def multiply(rows: Tensor, matrix: Tensor, out: Tensor, **how: Any) -> None:
            honest(rows, matrix, out, **how)
            tamper(out)

        computer.multiply = multiply  # type: ignore[method-assign]

    def ask(self, rows: int, *, backward: bool = False) -> Tensor:
        """One product of rows that are different each time."""
        x = SecretStream.fresh().normal(rows, Q if backward else P, dtype=torch.float32).to(self.dtype)
        if backward:
            return self.product.finish_backward(self.product.start_backward(x))
        return self.product.finish_forward(self.product.start_forward(x))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", TAMPERING)
def test_it_is_refused_at_its_first_product(kind: str, profile: str, name: str) -> None:
    """One row, few and many; forward and backward."""
    for rows in ROWS.values():
        for backward in (False, True):
            offloaded = Offloaded(profile, DTYPES[name], TAMPERING[kind])
            with pytest.raises((WrongProduct, BadReply)):
                offloaded.ask(rows, backward=backward)
            assert offloaded.client.stats.verified == 0
            assert offloaded.client.stats.retries == 0, "a product that is refused is not asked for again"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("profile", PROFILES)
def test_an_honest_product_of_any_size_is_not(profile: str, name: str) -> None:
    """Rows of nothing and of very small numbers among them: where they round to nothing, that is no lie."""
    offloaded = Offloaded(profile, DTYPES[name])
    sizes = (1.0, 0.0, 1e-4, 1e-7, 1e3)
    for rows in ROWS.values():
        for size in sizes:
            for transpose in (False, True):
                x = KEY.stream("x", rows).normal(rows, Q if transpose else P).to(DTYPES[name]) * size
                way = ("backward", x) if transpose else ("forward", x)
                started = getattr(offloaded.product, f"start_{way[0]}")(x)
                getattr(offloaded.product, f"finish_{way[0]}")(started)
    assert offloaded.client.stats.verified == offloaded.client.stats.crossings == 2 * len(ROWS) * len(sizes)
