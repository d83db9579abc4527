"""Fixtures of the contract."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import copy_of, float64_kept, protected


@pytest.fixture(autouse=True)
def repeatable_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixing of every crossing from a fixed key, so that a failure comes back when the test is run again."""
    numbers = itertools.count()
    fixed = RootKey(bytes(32))
    monkeypatch.setattr(SecretStream, "fresh", lambda: fixed.stream("test", next(numbers)))


@pytest.fixture
def float64_throughout() -> Iterator[None]:
    """No float32 casts inside a float64 model, neither plain nor protected (docs/adr/0006)."""
    with float64_kept():
        yield


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
