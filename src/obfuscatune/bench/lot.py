"""Part of `bench verify`: can a worker tell from time which of its products will be checked, before it answers?

The worker is a real one that records. It knows how long passed between each reply of its own and the request that
came next, and says by that which requests are checked. The enclave knows which were.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from obfuscatune.audit.attacks.scoring import area_under_curve
from obfuscatune.bench.clocked import clocked_worker
from obfuscatune.bench.wire import free_port
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.linear import Held, OffloadedProduct
from obfuscatune.enclave.link import WorkerLink
from obfuscatune.enclave.mixer import KroneckerMixer
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.enclave.verify import Verifier
from obfuscatune.wire.files import temporary_root
from obfuscatune.wire.messages import MessageType
from obfuscatune.wire.transcript import read_transcript

LINKS = ("shared memory", "tcp")
SHARE = 0.5
"""Of the requests that are checked. Half of them: then the attacker's score errs least."""
_SHIELD_ROWS = 8
_MATRIX_ID = bytes(15) + b"\x01"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class LotRow:
    """How well a worker guesses over one kind of link."""

    link: str
    rows: int
    """Of one request, before shield rows join them."""
    requests: int
    area: float
    """AUC of the pause before a request for whether it is checked; chance is 0.5."""
    error: float
    """Its standard error."""
    checked_us: float
    """Median pause before a request that is checked."""
    spared_us: float
    """Median pause before one that is not."""


@dataclass(frozen=True)
class LotBench:
    """What is measured."""

    requests: int = 1_000
    rows: tuple[int, ...] = (1, 64)
    width: int = 256

    def run(self, progress: Progress) -> list[LotRow]:
        """Measure; some seconds for each link.

        Raises:
            WireError: a worker did not start, or was lost.
        """
        measured = []
        for link in LINKS:
            for rows in self.rows:
                row = self._measured(link, rows)
                progress(f"{link}, {rows} rows: AUC {row.area:.3f} +- {row.error:.3f} for which product is checked")
                measured.append(row)
        return measured

    def _measured(self, name: str, rows: int) -> LotRow:
        with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-", dir=temporary_root()) as folder:
            listen = f"tcp:127.0.0.1:{free_port()}" if name == "tcp" else None
            with (
                clocked_worker(1, listen, ("--record", folder)) as worker,
                WorkerLink.open(worker.address) as link,
            ):
                checked = torch.tensor(self._asked(link, rows))
            pauses = torch.tensor(_pauses(Path(folder)))
        area, error = area_under_curve(pauses, checked)
        medians = (statistics.median(pauses[chosen].tolist()) / 1000 for chosen in (checked, ~checked))
        return LotRow(name, rows, len(pauses), area, error, *medians)

    def _asked(self, link: WorkerLink, rows: int) -> list[bool]:
        """Which of the requests were checked; the first is left out, for nothing was answered before it."""
        stream = SecretStream.fresh()
        R_in, R_out = (StructuredTransform(self.width, stream) for _ in range(2))
        W_star = stream.normal(self.width, self.width, dtype=torch.float32)
        link.store(_MATRIX_ID, lambda: W_star, shape=(self.width, self.width), dtype=W_star.dtype)
        mixer, verifier = KroneckerMixer(_SHIELD_ROWS, stream), Verifier(W_star, stream, SHARE)
        product = OffloadedProduct(link, Held(_MATRIX_ID, verifier=verifier), R_in, R_out, mixer)
        x = stream.normal(rows, self.width, dtype=torch.float32)
        checked = []
        for _ in range(self.requests + 1):
            before = link.stats.verified
            product.finish_forward(product.start_forward(x))
            checked.append(link.stats.verified > before)
        return checked[1:]


def _pauses(transcript: Path) -> list[float]:
    """Nanoseconds from each reply to the request after it."""
    pauses, replied = [], None
    for entry in read_transcript(transcript):
        if entry.header.type is MessageType.PRODUCT:
            replied = entry.at_ns
        elif entry.header.type is MessageType.MULTIPLY and replied is not None:
            pauses.append(float(entry.at_ns - replied))
    return pauses
