"""How fast a member is, and whether it is late again and again. All of it is what the member made us measure."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
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


class Times:
    """The latest times of one kind of request. Asked far more often than added to, so they lie sorted, too."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        """One more; the oldest is forgotten once there are `REMEMBERED`."""
        if len(self._latest) == REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(seconds)
        insort(self._sorted, seconds)

    def within(self, share: float) -> float | None:
        """Seconds that this share of them took at most; None where nothing can be concluded yet."""
        count = len(self._sorted)
        return None if count < FEWEST else self._sorted[max(0, math.ceil(share * count) - 1)]


class Timing:
    """Not safe from several threads: the fleet's lock guards it."""

    def __init__(self) -> None:
        self.speed = UNKNOWN_SPEED
        """Multiplications a second: the most that was ever measured, since other load only makes it less."""
        self._seconds: defaultdict[int, Times] = defaultdict(Times)
        self._late: deque[bool] = deque(maxlen=LATE_OF)

    def calibrated(self, work: int, seconds: float) -> None:
        """`work` multiplications took that long."""
        measured = work / max(seconds, 1e-9)
        self.speed = measured if self.speed == UNKNOWN_SPEED else max(self.speed, measured)

    def took(self, kind: int, seconds: float) -> None:
        """A request of that kind was answered."""
        self._seconds[kind].add(seconds)

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
        median = self._seconds[kind].within(0.5)
        return work / self.speed if median is None else median

    def p99(self, kind: int) -> float | None:
        """Seconds that 99 % of the latest requests of that kind took at most; None before it is known."""
        return self._seconds[kind].within(0.99)


def hedge_after(p99s: list[float], slowness: float, expected: float, *, least: float, most: float) -> float:
    """Seconds after which a request is sent to another replica too.

    The lower median over the members: one slow member does not make all wait. A member that is slower by nature is
    given more time, up to four times as much.
    """
    if not p99s:
        return max(most, 4 * expected)
    typical = sorted(p99s)[(len(p99s) - 1) // 2]
    return min(max(1.5 * typical * min(max(slowness, 1.0), 4.0), least), max(most, 4 * expected))
