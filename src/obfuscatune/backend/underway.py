"""A product that was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.cuda import Event

from obfuscatune.errors import DeadlineExceeded

BUSY_SECONDS = 0.002
"""How long an event is asked again and again, before the thread sleeps between: most products take less. Meanwhile it
lets other threads of Python's go on."""
PAUSE_SECONDS = 0.0001


class Underway(Protocol):
    """A product that may still be computed. Memory that it reads or writes is kept until it is done."""

    def is_at_rest(self) -> bool:
        """Whether nothing of it is read or written now, unless somebody waits."""

    def wait(self, seconds: float, broken_off: Callable[[], bool] = bool) -> None:
        """Return when it is done. From any thread; twice is once.

        Args:
            seconds: how long at most.
            broken_off: whether to wait no more, asked now and then.

        Raises:
            DeadlineExceeded: it is not done by then, or waiting was broken off.
            RuntimeError: the device failed.
        """


class Deferred:
    """On the CPU: computed by whoever waits for it, since there is no other processor that could."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self._compute: Callable[[], None] | None = compute
        self._lock = threading.Lock()

    def is_at_rest(self) -> bool:
        """See `Underway`."""
        return True

    def wait(self, seconds: float, broken_off: Callable[[], bool] = bool) -> None:
        """See `Underway`; what is computed here cannot be late."""
        with self._lock:
            if self._compute is not None:
                self._compute()
                self._compute = None


class OnStreams:
    """On a CUDA device: done when an event is."""

    def __init__(self, event: Event, kept: tuple[Tensor, ...]) -> None:
        """
        Args:
            event: recorded after all of it.
            kept: what is read and written until then.
        """
        self._event, self._kept = event, kept

    def is_at_rest(self) -> bool:
        """See `Underway`; a device that failed reads and writes nothing more."""
        try:
            return bool(self._event.query())
        except RuntimeError:
            return True

    def wait(self, seconds: float, broken_off: Callable[[], bool] = bool) -> None:
        """See `Underway`. `Event.synchronize` knows no deadline, and a device that hangs would hang the enclave."""
        started = time.monotonic()
        while not self._event.query():
            waited = time.monotonic() - started
            if waited > seconds or broken_off():
                raise DeadlineExceeded(f"the device has not answered for {waited:.0f} s")
            time.sleep(PAUSE_SECONDS if waited > BUSY_SECONDS else 0)
