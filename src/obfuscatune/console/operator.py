"""The operator's page: how busy a service is. Sums over all owners and models; nothing of whom, nothing of what.

The service hands in a `Snapshot` whenever the page asks; this module asks the service for nothing.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import Response

from obfuscatune.console.shell import Shell

NAVIGATION = (("/", "operator.overview"),)


@dataclass(frozen=True)
class WorkerLoad:
    """What went to one worker and back since the service started."""

    role: str
    """`compute` or `mask`."""
    address: str
    products: int = 0
    sent: int = 0
    received: int = 0
    seconds_waiting: float = 0.0
    reconnects: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A service at one moment."""

    versions: Mapping[str, str]
    """Of what runs: the service, its libraries, the protocol to the workers."""
    profile: str
    started: float
    """Unix seconds."""
    workers: tuple[WorkerLoad, ...] = ()
    models: Mapping[str, int] = field(default_factory=dict)
    """By status."""
    jobs: Mapping[str, int] = field(default_factory=dict)
    """By status."""
    jobs_at_once: int = 0
    job_products: int = 0
    """Of the jobs that run."""
    answering: int = 0
    waiting: int = 0
    queue: int = 0
    """Places for requests that wait."""
    tokens: int = 0
    """Read and chosen since the service started."""
    disk_total: int = 0
    disk_free: int = 0


@dataclass(frozen=True)
class Rates:
    """Changes a second since the look before."""

    tokens: float = 0.0
    products: float = 0.0
    workers: tuple[float, ...] = ()
    """Products of each worker, in the order of the snapshot."""


class _Pace:
    """Two looks make a rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._last: tuple[float, Snapshot] | None = None
        self._rates = Rates()

    def of(self, now: Snapshot) -> Rates:
        at = self._clock()
        with self._lock:
            if self._last is None:
                self._last = at, now
            elif at - self._last[0] >= 1.0:
                seconds, before = at - self._last[0], self._last[1]
                made = _products(now) - _products(before)
                each = [max(0, b.products - a.products) for a, b in zip(before.workers, now.workers, strict=False)]
                self._rates = Rates(
                    max(0, now.tokens - before.tokens) / seconds,
                    max(0, made) / seconds,
                    tuple(it / seconds for it in each),
                )
                self._last = at, now
            return self._rates


def _products(snapshot: Snapshot) -> int:
    return sum(it.products for it in snapshot.workers) + snapshot.job_products


def operator_console(look: Callable[[], Snapshot], tell: Callable[[str], None]) -> Shell:
    """The operator's pages.

    Args:
        look: Reads the service, as it is now.
        tell: Says something where the service was started: a new link.
    """
    shell, pace = Shell("operator", NAVIGATION, tell), _Pace()

    @shell.router.get("/")
    def overview(request: Request) -> Response:
        """The page."""
        now = look()
        return shell.page(request, "operator/overview.html", now=now, rates=pace.of(now))

    @shell.router.get("/now")
    def now(request: Request) -> Response:
        """The part that changes: the page asks for it again every few seconds."""
        found = look()
        return shell.page(request, "operator/now.html", now=found, rates=pace.of(found))

    return shell
