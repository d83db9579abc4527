"""How fast a member is, and whether it is late again and again. All of it is what the member made us measure."""

from __future__ import annotations

import math
from collections import defaultdict, deque

REMEMBERED = 128
"""Times of one kind of request."""
FEWEST = 8
"""Times below which nothing is concluded from them."""
LATE_OF = 20
LATE_AT_MOST = 4
"""Of the last `LATE_OF` requests, how many may be late before a member is left for a while."""
UNKNOWN_SPEED = 1e9
"""Multiplications a second, before it is measured."""


class Timing:
    """Not safe from several threads: the fleet's lock guards it."""

    def __init__(self) -> None:
        self.speed = UNKNOWN_SPEED
        """Multiplications a second: the most that was ever measured, since other load only makes it less."""
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._late: deque[bool] = deque(maxlen=LATE_OF)

    def calibrated(self, work: int, seconds: float) -> None:
        """`work` multiplications took that long."""
        measured = work / max(seconds, 1e-9)
        self.speed = measured if self.speed == UNKNOWN_SPEED else max(self.speed, measured)

    def took(self, kind: int, seconds: float) -> None:
        """A request of that kind was answered."""
        self._seconds[kind].append(seconds)

    def was_late(self, late: bool) -> None:
        """Whether a request took longer than others would have."""
        self._late.append(late)

    @property
    def is_late_often(self) -> bool:
        """Whether that happened more often than chance explains."""
        return sum(self._late) > LATE_AT_MOST

    def forgiven(self) -> None:
        """Begin to count anew."""
        self._late.clear()
        self._seconds.clear()

    def expected(self, kind: int, work: int) -> float:
        """Seconds that a request takes as a rule."""
        seconds = self._seconds.get(kind, ())
        return work / self.speed if len(seconds) < FEWEST else sorted(seconds)[len(seconds) // 2]

    def p99(self, kind: int) -> float | None:
        """Seconds that 99 % of the latest requests of that kind took at most; None before it is known."""
        seconds = self._seconds.get(kind)
        if seconds is None or len(seconds) < FEWEST:
            return None
        return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


def hedge_after(p99s: list[float], slowness: float, expected: float, *, least: float, most: float) -> float:
    """Seconds after which a request is sent to another replica too.

    The lower median over the members: one slow member does not make all wait. A member that is slower by nature is
    given more time, up to four times as much.
    """
    if not p99s:
        return max(most, 4 * expected)
    typical = sorted(p99s)[(len(p99s) - 1) // 2]
    return min(max(1.5 * typical * min(max(slowness, 1.0), 4.0), least), max(most, 4 * expected))
