"""What audits and measurements are told of a protected model: nothing is patched, and nothing changes for it.

span        names the parts of a request, which `torch.profiler` shows and `obfuscatune bench` adds up
Observer    sees secrets and plain rows; handed to `load` or `protect`
StageClock  adds up the seconds that `load` spends in each of its stages
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

from obfuscatune.enclave.transforms import Transform

_NOTHING: AbstractContextManager[object] = nullcontext()


class Observer(Protocol):
    """Sees what no worker may see: for audits and tests, with data that may be seen."""

    def keyed(self, layer: str, R_in: Transform, R_out: Transform) -> None:
        """The matrix of a layer, or of layers that share their input, lies on the worker under these transforms."""

    def requested(self, layer: str, rows: Tensor, *, transposed: bool) -> None:
        """Plain rows x (n, p) are about to be multiplied by W; `transposed`, gradients g (n, q) by its transpose."""


def span(name: str) -> AbstractContextManager[object]:
    """What is done within is `name` to a profiler; where none runs, asking costs a tenth of torch's own span."""
    return record_function(name) if profiler._is_profiler_enabled else _NOTHING


@dataclass
class StageClock:
    """Seconds, of both threads together: up to twice as many as passed. Safe from any thread."""

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
