"""Fixtures of the contract."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.local import LocalWorker
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import copy_of, protected


@pytest.fixture(autouse=True)
def repeatable_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixing of every crossing from a fixed key, so that a failure comes back when the test is run again."""
    numbers = itertools.count()
    fixed = RootKey(bytes(32))
    monkeypatch.setattr(SecretStream, "fresh", lambda: fixed.stream("test", next(numbers)))


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave float64 tensors in float64 where a model asks for float32; for the plain and the protected run alike.

    Norms, softmax, rotary embeddings and losses cast to float32, in a float64 model too. Two runs that differ by
    1e-16 then now and then round to neighbouring float32 numbers, 6e-8 apart (docs/adr/0006).
    """
    to, to_float, softmax = Tensor.to, Tensor.float, functional.softmax

    def wider(tensor: Tensor, dtype: Any) -> Any:
        return torch.float64 if dtype is torch.float32 and tensor.dtype == torch.float64 else dtype

    def to_kept(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(wider(tensor, argument) for argument in args)
        return to(tensor, *args, **{name: wider(tensor, value) for name, value in kwargs.items()})

    monkeypatch.setattr(Tensor, "to", to_kept)
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else to_float(tensor))
    monkeypatch.setattr(
        functional, "softmax", lambda x, *args, dtype=None, **kw: softmax(x, *args, dtype=wider(x, dtype), **kw)
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    """Each architecture in turn."""
    chosen = ARCHITECTURES[request.param]
    if chosen.directory is not None:
        request.getfixturevalue("stories260k")
    return chosen


@pytest.fixture(scope="module")
def plain(architecture: Architecture) -> Any:
    """The plain model in float64. Not to be changed."""
    return architecture.build(torch.float64)


@pytest.fixture(scope="module")
def shielded(plain: Any, worker: LocalWorker) -> Iterator[Any]:
    """The same model, protected. Not to be changed."""
    with protected(copy_of(plain), worker) as model:
        yield model
