"""`bench verify`: how often a wrong product is overlooked, how near an honest one comes to a false alarm, and whether a
worker can tell from time which product will be checked, before it answers. Under masks: `verify_masks`.

For the last, the worker is a real one that records. It knows how long passed between each reply of its own and the
request that came next, and says by that which requests are checked. The enclave knows which were.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obfuscatune.audit.attacks.scoring import area_under_curve
from obfuscatune.bench.clocked import clocked_worker
from obfuscatune.bench.link import free_port
from obfuscatune.bench.processes import Progress, scratch_folder
from obfuscatune.bench.verify_masks import MaskedBench, MaskedResult, noise, one_element, two_that_cancel
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.product import Held, OffloadedProduct
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.enclave.verification import VECTORS, Verifier
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.transcript import read_transcript
from obfuscatune.report.page import environment, markdown_table

SIZES = ((1, 64, 192), (9, 256, 64), (64, 128, 96))
"""(n, p, q) of the honest calls."""
TAMPERED = (32, 256, 256)
"""(n, p, q) of the tampered ones."""
STEPS = {torch.float32: (1e-4, 3e-4, 1e-3, 1e-2), torch.bfloat16: (0.1, 1.0, 3.0, 10.0)}
"""Sizes of tampering, over the root mean square of the product."""
LINKS = ("shared memory", "tcp")
SHARE = 0.5
"""Share of the requests that are checked. At one half the attacker's AUC has the smallest standard error."""
_MASKED_SHARE = 10
"""How many times fewer honest calls there are under masks, at each shape: they are larger."""
_SHIELD_ROWS = 8
_MATRIX_ID = bytes(15) + b"\x01"


@dataclass(frozen=True)
class TamperingRow:
    """One kind and size of tampering."""

    dtype: str
    kind: str
    size: float
    """Change of an element, relative to the root mean square of the product."""
    caught: float
    """Share of the trials in which the change was detected."""
    stated: float
    """Least share by the stated bound."""


@dataclass(frozen=True)
class VerifyBench:
    """What is measured."""

    honest_calls: int = 100_000
    trials: int = 1_000
    requests: int = 1_000
    """Over each kind of link, of a worker that guesses which are checked."""

    def run(self, progress: Progress) -> VerifyResult:
        """Measure; some minutes with the defaults."""
        worst: dict[str, float] = {}
        alarms: dict[str, int] = {}
        for dtype in STEPS:
            name = str(dtype).removeprefix("torch.")
            worst[name], alarms[name] = self._honest(dtype, name, progress)
        rows = [row for dtype in STEPS for row in self._tampered(dtype, progress)]
        masks = MaskedBench(-(-self.honest_calls // _MASKED_SHARE), self.trials).run(progress)
        lots = LotBench(self.requests).run(progress)
        return VerifyResult(self, worst, alarms, rows, masks, lots, environment())

    def _honest(self, dtype: torch.dtype, name: str, progress: Progress) -> tuple[float, int]:
        """The largest excess of all honest calls, and how many exceeded 1."""
        worst, alarms, done = 0.0, 0, 0
        for size in SIZES:
            request = _Request(size, dtype)
            for _ in range(self.honest_calls // len(SIZES) + 1):
                if done % 20 == 0:
                    request.renew()
                excess = request.excess(request.product)
                worst, alarms, done = max(worst, excess), alarms + (excess > 1), done + 1
                if done % 10_000 == 0:
                    progress(
                        f"{name}: {done} honest calls, {alarms} false alarms, nearest {worst:.2f} of the tolerance"
                    )
        return worst, alarms

    def _tampered(self, dtype: torch.dtype, progress: Progress) -> Iterator[TamperingRow]:
        name = str(dtype).removeprefix("torch.")
        request = _Request(TAMPERED, dtype)
        for kind, tamper in TAMPERING.items():
            for size in STEPS[dtype]:
                caught, stated = 0, 0.0
                for trial in range(self.trials):
                    if trial % 4 == 0:
                        request.renew()
                        rms = float(request.product.square().mean().sqrt())
                        changed = request.product + size * rms * tamper(request.product, request.stream)
                        stated += request.stated(changed) / -(-self.trials // 4)
                    caught += request.excess(changed) > 1
                row = TamperingRow(name, kind, size, caught / self.trials, stated)
                progress(f"{name}, {kind} by {size:g} rms: {row.caught:.1%} caught, at least {row.stated:.1%} stated")
                yield row


@dataclass(frozen=True)
class VerifyResult:
    """What was measured."""

    bench: VerifyBench
    worst: dict[str, float]
    """By dtype: the largest deviation of an honest call, over its tolerance."""
    alarms: dict[str, int]
    """By dtype: honest calls that were taken for wrong."""
    rows: list[TamperingRow]
    masks: MaskedResult
    lots: list[LotRow]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {
            "honest_calls": self.bench.honest_calls,
            "trials": self.bench.trials,
            "worst_honest": self.worst,
            "false_alarms": self.alarms,
            "tampering": [vars(row) for row in self.rows],
            "masks": asdict(self.masks),
            "which_is_checked": [vars(row) for row in self.lots],
            "environment": self.environment,
        }

    def as_markdown(self) -> str:
        """Five tables."""
        calls = self.bench.honest_calls
        honest = [(name, calls, self.alarms[name], f"{worst:.2f}") for name, worst in self.worst.items()]
        tampered = [(it.dtype, it.kind, f"{it.size:g}", f"{it.caught:.1%}", f">= {it.stated:.1%}") for it in self.rows]
        lots = []
        for it in self.lots:
            area, pauses = f"{it.area:.3f} ± {it.error:.3f}", (round(it.checked_us), round(it.spared_us))
            lots.append((it.link, it.rows, it.requests, area, *pauses))
        tables = (
            markdown_table(("dtype", "honest calls", "false alarms", "nearest to the tolerance"), honest),
            markdown_table(
                ("dtype", "changed", "by (rms of the product)", "caught", "stated"), tampered, text_columns=2
            ),
            self.masks.as_markdown(),
            markdown_table(
                ("link", "rows", "requests", "AUC: which is checked", "pause before it, µs", "before others, µs"), lots
            ),
        )
        return "\n\n".join(tables) + "\n"


class _Request:
    """Mixed rows, their honest product, and probes of it."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype
        self.stream = SecretStream.fresh()
        self.renew()

    def renew(self) -> None:
        """Other weights, other rows; with outlier features, as language models have."""
        n, p, q = self._size
        self._W = self.stream.normal(p, q).mul(0.02).to(self._dtype)
        self._verifier = Verifier(self._W, self.stream, 1.0)
        self._x = self.stream.normal(n, p, dtype=torch.float32)
        self._x[:, 0] *= 30
        self._mixing = KroneckerMixer(8, self.stream).draw(n, p)
        self._x = self._mixing.scaled(self._x)
        rows = self._x.new_empty(self._mixing.rows, p)
        self._mixing.mix(self._x, rows)
        self.product = (rows.to(self._dtype) @ self._W).float()

    def excess(self, product: Tensor) -> float:
        """The deviation of a product under a fresh probe, over the tolerance."""
        probe = self._verifier.probe(transpose=False)
        return float(probe.excess(product, self._mixing.image(self._x, probe.V), self._mixing.size, self._dtype))

    def stated(self, changed: Tensor) -> float:
        """The bound on how often that change is caught."""
        tau = self._verifier.probe(transpose=False).tolerance(changed, self._mixing.size, self._dtype)
        sizes = torch.linalg.vector_norm(changed - self.product, dim=1).double()
        missed = float((0.8 * tau / sizes).min())
        return 1 - min(1.0, missed) ** VECTORS[self._dtype]


def _one_row(product: Tensor, stream: SecretStream) -> Tensor:
    return torch.cat([noise(product[:1], stream), torch.zeros_like(product[1:])])


TAMPERING = {
    "one element": one_element,
    "two elements that cancel": two_that_cancel,
    "one row, noise": _one_row,
    "all, noise": noise,
}
"""Changes (m, q) of a product (m, q), whose changed elements are about 1."""


@dataclass(frozen=True)
class LotRow:
    """How well a worker guesses over one kind of link."""

    link: str
    rows: int
    """Rows of one request, without shield rows."""
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
        with scratch_folder() as folder:
            listen = f"tcp:127.0.0.1:{free_port()}" if name == "tcp" else None
            with (
                clocked_worker(1, listen, ("--record", folder)) as (worker, _),
                WorkerClient.open(worker.address) as link,
            ):
                checked = torch.tensor(self._asked(link, rows))
            pauses = torch.tensor(_pauses(Path(folder)))
        area, error = area_under_curve(pauses, checked)
        medians = (statistics.median(pauses[chosen].tolist()) / 1000 for chosen in (checked, ~checked))
        return LotRow(name, rows, len(pauses), area, error, *medians)

    def _asked(self, link: WorkerClient, rows: int) -> list[bool]:
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
