"""Steps that begin at the ticks of a clock: which tick, how many came late, and that nothing else changes."""

from __future__ import annotations

from itertools import cycle, pairwise
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.pace import Pace, paced
from obfuscatune.errors import ConfigError, ProtectionError
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, copy_of, greedy, protected, with_lora

LLAMA = ARCHITECTURES["llama"]
PERIOD = 10.0
"""Seconds of a clock that only moves when it is told to."""


class Clock:
    """A clock that stands, and one who sleeps by it."""

    def __init__(self) -> None:
        self.now, self.early = 1000.0, 0.0
        """The time, and how much too early every sleep ends."""

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds - self.early, 0.25)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(PERIOD, clock=clock, sleep=clock.sleep)


def ticks(pace: Pace, clock: Clock, work: list[float]) -> list[float]:
    """At which ticks steps begin, before each of which something else takes so long."""
    found = []
    for seconds in work:
        clock.now += seconds
        pace.wait()
        found.append((clock.now - 1000.0 - work[0]) / PERIOD)
    return found


def test_steps_begin_at_ticks_whatever_is_done_between_them(pace: Pace, clock: Clock) -> None:
    """The first begins at once, and sets the clock."""
    assert ticks(pace, clock, [3.0, 0.0, 9.5, 1.0, 0.25, 10.0]) == [0, 1, 2, 3, 4, 5]
    assert (pace.steps, pace.late) == (6, 0)


def test_a_late_step_waits_for_the_next_tick_and_is_counted(pace: Pace, clock: Clock) -> None:
    assert ticks(pace, clock, [0.0, 10.5, 1.0, 35.0, 9.0, 20.0]) == [0, 2, 3, 7, 8, 10]
    assert (pace.steps, pace.late) == (6, 3)
    assert repr(pace) == "Pace(10 s, 3 of 6 steps late)"


def test_a_sleep_that_ends_early_is_taken_up_again(pace: Pace, clock: Clock) -> None:
    clock.early = 2.0
    assert ticks(pace, clock, [0.0, 1.0, 1.0]) == [0, 1, 2]


@pytest.mark.parametrize("period", [0, -1.0, float("nan"), float("inf")])
def test_a_period_that_is_none_is_refused(period: float) -> None:
    with pytest.raises(ConfigError, match="a pace is a time in seconds above 0"):
        Pace(period)


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "peft"])
@pytest.mark.parametrize("profile", ["private", "guarded"])
def test_each_pass_sends_its_first_request_at_a_tick(
    clock: Clock, pace: Pace, worker: LocalWorker, mask_worker: LocalWorker, profile: str, adapted: bool
) -> None:
    """Time passes in the enclave while it works: before each pass, and in each layer that stays here."""
    asked: list[tuple[str, float]] = []

    class Notes:
        def keyed(self, layer: str, *_: Any) -> None:
            pass

        def requested(self, layer: str, *_: Any, transposed: bool) -> None:
            asked.append((layer, clock.now))

    masks = {"mask_worker": mask_worker.address} if profile == "guarded" else {}
    plain, prompt = LLAMA.build(torch.float32), batch((6,), 97)
    expected = greedy(with_lora(copy_of(plain), LLAMA).eval() if adapted else plain, prompt, tokens=5)
    with protected(copy_of(plain), worker, profile=profile, observer=Notes(), **masks) as model:
        base = model
        if adapted:
            model = with_lora(model, LLAMA).eval()

        durations = cycle([0.5, 3.0, 1.25])

        def work(*_: object) -> None:
            clock.now += next(durations)

        base.register_forward_pre_hook(work)
        base.get_input_embeddings().register_forward_hook(work)
        with paced(model, pace) as kept:
            assert torch.equal(greedy(model, prompt, tokens=5), expected)
        assert kept is pace
        assert (pace.steps, pace.late) == (5, 0)
        first = [at for layer, at in asked if layer == asked[0][0]]
        assert [later - earlier for earlier, later in pairwise(first)] == [PERIOD] * 4
        base(**prompt.inputs())
        assert pace.steps == 5, "what comes after the `with` is not paced"


def test_a_model_that_sends_nothing_is_refused() -> None:
    with pytest.raises(ProtectionError, match="no layer on a worker"), obfuscatune.paced(LLAMA.build(torch.float32), 1):
        pass
