"""The contract again, with devices of this machine as workers: the tests of processes, on `device:cpu`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.test_exactness import test_crossings as test_crossings
from tests.contract.test_exactness import test_every_lora_gradient as test_every_lora_gradient
from tests.contract.test_exactness import test_greedy_generation as test_greedy_generation
from tests.contract.test_exactness import test_logits_and_loss as test_logits_and_loss
from tests.contract.test_exactness import test_ten_steps_of_adamw as test_ten_steps_of_adamw
from tests.contract.test_guarded import TestOfEachArchitecture as TestUnderMasks
from tests.contract.test_guarded import guarded as guarded

__all__ = ["TestUnderMasks"]

FEW = ("gpt2",)
"""With biases, and matrices that lie the other way round; the others are `long`."""
EVERY = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES]
pytestmark = pytest.mark.usefixtures("float64_throughout")


@dataclass(frozen=True)
class Device:
    """A device, in the place of a `LocalWorker`."""

    address: str


@pytest.fixture(scope="module", params=EVERY)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    chosen = ARCHITECTURES[request.param]
    if chosen.directory is not None:
        request.getfixturevalue("stories260k")
    return chosen


@pytest.fixture(scope="module")
def worker() -> Device:
    return Device("device:cpu:0")


@pytest.fixture(scope="module")
def mask_worker() -> Device:
    return Device("device:cpu:1")
