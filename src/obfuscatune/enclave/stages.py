"""Where the time of `load` went: seconds spent in each of its stages. Two matrices pass through them at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StageClock:
    """Seconds, of both lanes together: up to twice as many as passed. Safe from any thread."""

    reading: float = 0.0
    """The weights from the files, those that stay in the enclave too."""
    transforming: float = 0.0
    """W to W_star, drawing its secrets included."""
    sending: float = 0.0
    """Until the worker has confirmed each matrix; what its products are to be checked by is computed then, too."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # no field: as a dictionary, this is seconds alone

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add what passes inside the `with` to that stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            passed = time.monotonic() - started
            with self._lock:
                setattr(self, stage, getattr(self, stage) + passed)
