"""Constant-rate decoding: forward passes whose requests begin at the ticks of a clock.

    pass 0   ->  its first request is sent at once: tick 0
    pass k   ->  what is due before its first request  ->  wait for the next tick  ->  its requests

What lies between two passes is out of sight then: choosing a token, decoding it, showing it, looking for the end. It
waits before the first request, so the blocks that stay in the enclave are out of sight too. Within a pass nothing
waits: the time from a reply to the next request of the same pass is open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from obfuscatune.enclave.layers import first_protected
from obfuscatune.errors import ConfigError, ProtectionError


class Pace:
    """Holds steps back to multiples of a period after the first. Not for several threads at a time."""

    def __init__(
        self,
        period_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            period_s: seconds between two ticks.
            clock: seconds that never run backwards.
            sleep: waits for so many seconds; waking early is made up for.

        Raises:
            ConfigError: the period is not above 0, or not finite.
        """
        if not 0 < period_s < math.inf:
            raise ConfigError(f"a pace is a time in seconds above 0, got {period_s}")
        self.period_s = period_s
        self.steps = 0
        """Steps that were begun."""
        self.late = 0
        """Steps that were not ready at their tick, and waited for a later one."""
        self._clock, self._sleep = clock, sleep
        self._began_s, self._tick = 0.0, 0

    def wait(self) -> None:
        """Return at the tick after that of the last step; where that is over, at the next."""
        now = self._clock()
        self.steps += 1
        if self.steps == 1:
            self._began_s = now
            return
        self._tick += 1
        if now > self._began_s + self._tick * self.period_s:
            self.late += 1
            self._tick = math.ceil((now - self._began_s) / self.period_s)
        due = self._began_s + self._tick * self.period_s
        while (left := due - self._clock()) > 0:
            self._sleep(left)

    def __repr__(self) -> str:
        return f"Pace({self.period_s:g} s, {self.late} of {self.steps} steps late)"


@contextmanager
def paced(model: nn.Module, period_s: float | Pace) -> Iterator[Pace]:
    """Within it, forward passes of a protected model send their first request at multiples of `period_s` seconds.

    For one call of `generate` at a time: the first pass sets the clock, and each step of decoding is one pass.

    Args:
        model: protected, or PEFT's wrapper around one.
        period_s: seconds between two ticks, or a pace to go on with.

    Yields:
        The pace, which counts steps, and those that came late.

    Raises:
        ConfigError: the period is not above 0.
        ProtectionError: the model sends no requests.

    Example:
        >>> with obfuscatune.paced(model, 0.05) as pace:
        ...     model.generate(ids, max_new_tokens=128)
        >>> pace.late
    """
    pace = period_s if isinstance(period_s, Pace) else Pace(period_s)
    first = first_protected(model)
    if first is None:
        raise ProtectionError("the model has no layer on a worker: nothing is sent whose time could tell anything")
    before = first.before_request

    def wait(layer: nn.Module, x: Tensor) -> None:
        if before is not None:
            before(layer, x)
        pace.wait()

    first.before_request = wait
    try:
        yield pace
    finally:
        first.before_request = before
