"""Whose turn it is to compute: one at a time, and of those that wait the peer that has computed least."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_PRODUCTS = 1 << 36
"""Multiplications of one turn, about a second on a processor: a larger request is computed by parts, and others get
their turn in between."""


class Turns:
    """Start-time fair queueing (Goyal et al., SIGCOMM 1996) over peers. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[str] = []  # in the order in which they came
        self._computing: str | None = None
        self._spent: dict[str, float] = {}  # in seconds, since nobody waited

    @contextmanager
    def of(self, peer: str) -> Iterator[None]:
        """Wait for a turn of that peer, and have it while this lasts."""
        self._begin(peer)
        started = time.monotonic()
        try:
            yield
        finally:
            self._end(peer, time.monotonic() - started)

    def _begin(self, peer: str) -> None:
        with self._changed:
            if self._computing is None and not self._waiting:
                self._spent.setdefault(peer, 0.0)
                self._computing = peer
                return
            present = [self._spent[other] for other in (*self._waiting, self._computing) if other is not None]
            if peer != self._computing and peer not in self._waiting:  # to stay away is not to save turns up
                self._spent[peer] = max(self._spent.get(peer, 0.0), min(present, default=0.0))
            self._waiting.append(peer)
            self._changed.wait_for(lambda: self._computing is None and self._next() == peer)
            self._waiting.remove(peer)
            self._computing = peer

    def _end(self, peer: str, seconds: float) -> None:
        with self._changed:
            self._computing = None
            self._spent[peer] += seconds
            if self._waiting:
                self._changed.notify_all()
            else:
                self._spent.clear()

    def _next(self) -> str:
        return min(self._waiting, key=self._spent.__getitem__)
