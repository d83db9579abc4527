"""A worker in this process that adds to every product a change below the tolerance, always aimed at the same harm.

    offset    every row is moved by f tau in one direction u, whatever the rows are
    weights   every row x* is moved by c (x* p) u, for one direction p of rows: as if W* were W* + c p uᵀ. No row is
              moved further than f tau, and the one with the largest x* p as far

It knows the tolerance: its formula and, of rows that no mask hides, all that is in it. Where a mask does, it reckons
with what rows and products measure as a rule. It knows the transforms and the base model too, as if it had solved for
them: p and u come from the enclave's own secrets.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from obfuscatune.backend import Computer
from obfuscatune.enclave.masks import DEVIATION
from obfuscatune.enclave.mixing import SIZE_OF_ROWS
from obfuscatune.enclave.verification import MARGIN
from obfuscatune.protocol.endpoints import parse_address
from obfuscatune.protocol.files import temporary_root
from obfuscatune.protocol.limits import GIB
from obfuscatune.protocol.listen import Listener
from obfuscatune.worker.connection import Service
from obfuscatune.worker.handlers import Answerer
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.server import Server
from obfuscatune.worker.sessions import Sessions
from obfuscatune.worker.store import MatrixStore

Way = Literal["offset", "weights"]
_SESSIONS = 4


@dataclass(frozen=True)
class Push:
    """Where one layer's products are pushed, one way. Float64, in the worker's basis."""

    along: Tensor
    """p, the unit direction of rows that `weights` answers to."""
    into: Tensor
    """u, the unit direction in which products are moved."""
    gain: float
    """Root mean square norm of the product of a row, over that of a random row of the same norm."""


@dataclass(frozen=True)
class Aim:
    """The pushes of one layer, and what the worker knows its matrix by."""

    first_row: Tensor
    """Of W*."""
    forward: Push
    backward: Push


class DriftingComputer(Computer):
    """Computes as any worker does, and adds what should pass. Honest while `size` is 0, or `aims` is empty."""

    def __init__(self, way: Way = "offset", size: float = 0.0) -> None:
        """
        Args:
            way: see above.
            size: f, the largest change of a row over its tolerance.
        """
        super().__init__(torch.device("cpu"))
        self.way, self.size = way, size
        self.aims: list[Aim] = []
        self.products = 0
        """Computed so far."""
        self._known: dict[int, tuple[int | None, float]] = {}

    def multiply(self, rows: Tensor, matrix: Tensor, out: Tensor, *, transpose: bool) -> None:
        """See `Computer`."""
        super().multiply(rows, matrix, out, transpose=transpose)
        self.products += 1
        if not self.size or not self.aims:
            return
        index, norm = self._recognised(matrix)
        if index is None:
            return
        push = self.aims[index].backward if transpose else self.aims[index].forward
        with torch.inference_mode():
            tau = known_tolerance(rows, norm, out, push.gain, masked=rows.dtype != matrix.dtype)  # (m,)
            if self.way == "offset":
                sizes = tau
            else:
                sizes = rows.double() @ push.along
                sizes *= tau.min() / sizes.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            out.add_(torch.outer(self.size * sizes, push.into).to(out.dtype))

    def _recognised(self, matrix: Tensor) -> tuple[int | None, float]:
        """Which layer's matrix it is, None where it is none of those aimed at, and its norm."""
        key = matrix.data_ptr()
        if key not in self._known:
            index = next((i for i, aim in enumerate(self.aims) if _are_equal(aim.first_row, matrix[0])), None)
            self._known[key] = index, float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        return self._known[key]


def known_tolerance(rows: Tensor, norm: float, product: Tensor, gain: float, *, masked: bool) -> Tensor:
    """tau of each row (m,), float64, as far as a worker knows it; see `Probe.tolerance`.

    Args:
        rows: as they came (m, p).
        norm: |W*|.
        product: of these rows (m, q).
        gain: see `Push`; used where a mask hides rows and product.
        masked: whether one does.
    """
    unit = MARGIN[torch.float32] * torch.finfo(torch.float32).eps / 2
    if masked:
        of_masks = MARGIN[torch.float64] * torch.finfo(torch.float64).eps / 2 * DEVIATION * norm
        return torch.full((rows.shape[0],), unit * SIZE_OF_ROWS * norm * (1 + 2 * gain) + of_masks, dtype=torch.float64)
    size = float(torch.linalg.vector_norm(rows, dtype=torch.float64)) / math.sqrt(rows.numel())
    norms = torch.linalg.vector_norm(product, dim=1, dtype=torch.float64)
    sizes: Tensor = size * norm + norms + norms.square().mean().sqrt()
    return unit * sizes


def _are_equal(row: Tensor, other: Tensor) -> bool:
    return row.shape == other.shape and float((row - other).norm()) < 1e-3 * float(row.norm())


@contextmanager
def serving(computer: Computer) -> Iterator[str]:
    """A worker with that computer, in a thread of this process; yields its address."""
    with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-", dir=temporary_root(for_socket=True)) as folder:
        listener = Listener(parse_address(f"unix:{folder}/worker.sock"), None)
        store = MatrixStore(Quota(GIB))
        server = Server(listener, Service(Answerer(store, computer), Sessions(_SESSIONS, store)))
        thread = threading.Thread(target=server.serve, name="drifting worker", daemon=True)
        thread.start()
        try:
            yield str(listener.address)
        finally:
            server.stop()
            thread.join()
