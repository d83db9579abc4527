"""Where the time of `load` went: seconds spent in each of its stages, which overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StageClock:
    """Seconds. Sending goes on beside the other two, so all together may exceed what passed."""

    reading: float = 0.0
    """The weights from the files, those that stay in the enclave too."""
    transforming: float = 0.0
    """W to W_star, drawing its secrets included."""
    sending: float = 0.0
    """Until the worker has confirmed each matrix."""

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add what passes inside the `with` to that stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.monotonic() - started)
