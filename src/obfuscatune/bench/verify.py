"""`bench verify`: how often a wrong product is overlooked, how near an honest one comes to a false alarm, and whether a
worker can tell which product is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.bench.lot import LotBench, LotRow
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixer import KroneckerMixer
from obfuscatune.enclave.verify import VECTORS, Verifier
from obfuscatune.report.environment import environment

SIZES = ((1, 64, 192), (9, 256, 64), (64, 128, 96))
"""(n, p, q) of the honest calls."""
TAMPERED = (32, 256, 256)
"""(n, p, q) of the tampered ones."""
STEPS = {torch.float32: (1e-4, 3e-4, 1e-3, 1e-2), torch.bfloat16: (0.1, 1.0, 3.0, 10.0)}
"""Sizes of tampering, over the root mean square of the product."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TamperingRow:
    """One kind and size of tampering."""

    dtype: str
    kind: str
    size: float
    """Of each changed element, over the root mean square of the product."""
    caught: float
    """Share of the trials."""
    stated: float
    """What the bound promises at least."""


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
        lots = LotBench(self.requests).run(progress)
        return VerifyResult(self, worst, alarms, rows, lots, environment())

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
                        changed = tamper(request.product, size * rms)
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
            "which_is_checked": [vars(row) for row in self.lots],
            "environment": self.environment,
        }

    def as_markdown(self) -> str:
        """Three tables."""
        lines = ["| dtype | honest calls | false alarms | nearest to the tolerance |", "|---|---|---|---|"]
        calls = self.bench.honest_calls
        lines += [f"| {name} | {calls} | {self.alarms[name]} | {worst:.2f} |" for name, worst in self.worst.items()]
        lines += ["", "| dtype | changed | by (rms of the product) | caught | stated |", "|---|---|---|---|---|"]
        lines += [
            f"| {row.dtype} | {row.kind} | {row.size:g} | {row.caught:.1%} | >= {row.stated:.1%} |" for row in self.rows
        ]
        lines += ["", "| link | rows | requests | AUC: which is checked | pause before it, µs | before others, µs |"]
        lines.append("|---" * 6 + "|")
        lines += [
            f"| {row.link} | {row.rows} | {row.requests} | {row.area:.3f} ± {row.error:.3f} | {row.checked_us:.0f} "
            f"| {row.spared_us:.0f} |"
            for row in self.lots
        ]
        return "\n".join(lines) + "\n"


class _Request:
    """Mixed rows, their honest product, and probes of it."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype
        self._stream = SecretStream.fresh()
        self.renew()

    def renew(self) -> None:
        """Other weights, other rows; with outlier features, as language models have."""
        n, p, q = self._size
        self._W = self._stream.normal(p, q).mul(0.02).to(self._dtype)
        self._verifier = Verifier(self._W, self._stream, 1.0)
        self._x = self._stream.normal(n, p, dtype=torch.float32)
        self._x[:, 0] *= 30
        self._mixing = KroneckerMixer(8, self._stream).draw(n, p)
        self._x = self._mixing.scaled(self._x)
        rows = self._x.new_empty(self._mixing.rows, p)
        self._mixing.mix(self._x, rows)
        self.product = (rows.to(self._dtype) @ self._W).float()

    def excess(self, product: Tensor) -> float:
        """The deviation of a product under a fresh probe, over the tolerance."""
        probe = self._verifier.probe(transpose=False)
        return float(probe.excess(product, self._mixing.image(self._x, probe.v), self._mixing.size, self._dtype))

    def stated(self, changed: Tensor) -> float:
        """The bound on how often that change is caught."""
        tau = self._verifier.probe(transpose=False).tolerance(changed, self._mixing.size, self._dtype)
        sizes = torch.linalg.vector_norm(changed - self.product, dim=1).double()
        missed = float((0.8 * tau / sizes).min())
        return 1 - min(1.0, missed) ** VECTORS


def _one_element(product: Tensor, size: float) -> Tensor:
    changed = product.clone()
    changed[0, 0] += size
    return changed


def _two_that_cancel(product: Tensor, size: float) -> Tensor:
    changed = _one_element(product, size)
    changed[0, 1] -= size
    return changed


def _one_row(product: Tensor, size: float) -> Tensor:
    changed = product.clone()
    changed[0] += size * torch.randn(product.shape[1])
    return changed


def _noise(product: Tensor, size: float) -> Tensor:
    return product + size * torch.randn(product.shape)


TAMPERING = {
    "one element": _one_element,
    "two elements that cancel": _two_that_cancel,
    "one row, noise": _one_row,
    "all, noise": _noise,
}
