"""What audits and measurements are told of a protected model: nothing is patched, and nothing changes for it.

span       names the parts of a request, which `torch.profiler` shows and `obfuscatune bench` adds up
Observer   sees secrets and plain rows; handed to `load` or `protect`
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
