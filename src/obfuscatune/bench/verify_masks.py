"""`bench verify` under masks: what the tolerance lets pass of either worker's product, and how near honest ones come.

The request is one of profile `guarded`: float32 rows, mixed, rounded to the grid and masked in float64; both products
computed in float64 from W* in float32; the mask's product taken away. Beside them stands the same request without
masks, as `private` has it. A change is drawn without the secret vectors, which are drawn afresh for each trial.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.backend import Computer
from obfuscatune.bench.processes import Progress
from obfuscatune.enclave import kernels
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.masks import DEVIATION, GRID, draw
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.verification import Verifier
from obfuscatune.report.page import markdown_table

SHAPES = ((1, 256, 768), (9, 768, 256), (64, 256, 1024), (24, 3072, 768))
"""(n, p, q) of the honest calls."""
CHANGED = (32, 256, 256)
"""(n, p, q) of the calls whose product is changed."""
COMPUTE, MASK, UNMASKED = "compute worker", "mask worker", "worker, no masks"
PARTIES = (COMPUTE, MASK, UNMASKED)
NEARLY_ALL = 0.99
"""Shares of the trials in which a change is caught, of which the size is told."""
_RENEWED = 20
"""Honest calls with one matrix."""
_SHIELD_ROWS = 8
_SIZES = (1e-12, 1e12)
"""Norms of a change that passes and of one that is caught, for certain, relative to a row of the product."""


@dataclass(frozen=True)
class HonestRow:
    """Honest products of one party at one shape."""

    party: str
    shape: tuple[int, int, int]
    """(n, p, q), without shield rows."""
    calls: int
    alarms: int
    """Products that were taken for wrong."""
    worst: float
    """The largest deviation of any, over its tolerance."""


@dataclass(frozen=True)
class PassingRow:
    """How large a change of one kind is when it is caught."""

    party: str
    kind: str
    trials: int
    half: float
    """Norm of a row's change that is caught in half of the trials, over the root mean square norm of y's rows."""
    nearly_all: float
    """The same for `NEARLY_ALL` of them."""
    never: float
    """The smallest that was caught in any trial: smaller ones passed in all of them."""
    tolerance: float
    """tau of a row, on the same scale."""


@dataclass(frozen=True)
class MaskedBench:
    """What is measured."""

    honest_calls: int = 10_000
    """For each shape but the last, which is larger and has a tenth."""
    trials: int = 1_000

    def run(self, progress: Progress) -> MaskedResult:
        """Measure; a few minutes with the defaults."""
        honest = [row for shape in SHAPES for row in self._honest(shape, progress)]
        passing = [row for kind in KINDS for row in self._passing(kind, progress)]
        return MaskedResult(honest, passing)

    def _honest(self, shape: tuple[int, int, int], progress: Progress) -> Iterator[HonestRow]:
        calls = self.honest_calls if shape != SHAPES[-1] else -(-self.honest_calls // 10)
        request, excesses = MaskedRequest(shape), {party: [0.0] for party in PARTIES}
        for done in range(calls):
            request.renew(matrix=done % _RENEWED == 0)
            for party in PARTIES:
                excesses[party].append(request.excess(party)(request.product(party)))
        for party, found in excesses.items():
            row = HonestRow(party, shape, calls, sum(not it <= 1 for it in found), max(found))
            progress(f"{party}, {shape}: {calls} honest calls, {row.alarms} false alarms, nearest {row.worst:.2f}")
            yield row

    def _passing(self, kind: str, progress: Progress) -> Iterator[PassingRow]:
        request, sizes, tolerances = MaskedRequest(CHANGED), {party: [0.0] for party in PARTIES}, dict[str, float]()
        for trial in range(self.trials):
            request.renew(matrix=trial % 4 == 0)
            change = torch.nn.functional.normalize(KINDS[kind](request.product(UNMASKED), request.stream), dim=1)
            for party in PARTIES:
                sizes[party].append(_smallest_caught(request, party, change) / request.row_norm)
                tolerances[party] = request.tolerance(party) / request.row_norm
        for party, caught in sizes.items():
            caught = sorted(caught[1:])
            half = statistics.median(caught)
            nearly_all = caught[min(len(caught) - 1, math.ceil(NEARLY_ALL * len(caught)) - 1)]
            row = PassingRow(party, kind, self.trials, half, nearly_all, caught[0], tolerances[party])
            progress(f"{party}, {kind}: {half:.1e} of a row is caught in half of the trials, {nearly_all:.1e} in 99 %")
            yield row


@dataclass(frozen=True)
class MaskedResult:
    """What was measured."""

    honest: list[HonestRow]
    passing: list[PassingRow]

    def as_markdown(self) -> str:
        """Two tables."""
        honest = [
            (it.party, " x ".join(map(str, it.shape)), it.calls, it.alarms, f"{it.worst:.2f}") for it in self.honest
        ]
        passing = [
            (it.party, it.kind, *(f"{size:.1e}" for size in (it.tolerance, it.never, it.half, it.nearly_all)))
            for it in self.passing
        ]
        tables = (
            markdown_table(
                ("product of the", "n x p x q", "honest calls", "false alarms", "nearest to the tolerance"), honest, 2
            ),
            markdown_table(
                (
                    "product of the",
                    "changed",
                    "tolerance, of a row of y",
                    "always passes up to",
                    "caught in 50 % from",
                    "in 99 % from",
                ),
                passing,
                2,
            ),
        )
        return "\n\n".join(tables)


class MaskedRequest:
    """One request with and without a mask, the products of honest workers, and probes of them."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """A request of (n, p, q); see `CHANGED`."""
        self._shape = shape
        self.stream = SecretStream.fresh()
        self._mixer = KroneckerMixer(_SHIELD_ROWS, self.stream, in_buckets=True)
        self._computer = Computer(torch.device("cpu"))
        self.renew(matrix=True)

    def renew(self, *, matrix: bool) -> None:
        """Other rows, with outlier features, under another mask; and another matrix."""
        n, p, q = self._shape
        if matrix:
            self._W = self.stream.normal(p, q, dtype=torch.float32).mul_(0.02)
            self._verifiers = {torch.float64: Verifier(self._W.double(), self.stream, 1.0)}
            self._verifiers[torch.float32] = Verifier(self._W, self.stream, 1.0)
        x = self.stream.normal(n, p, dtype=torch.float32)
        x[:, 0] *= 30
        self._mixing = self._mixer.draw(n, p)
        self._x = self._mixing.scaled(x)
        X_star = torch.empty(self._mixing.rows, p)
        self._mixing.mix(self._x, X_star)
        self._r = draw(self.stream, self._mixing.rows, p)
        X_masked = torch.empty_like(self._r)
        kernels.mask_rows(X_star, self._r, GRID, X_masked)
        of_mask = self._multiplied(self._r)
        self._products = {
            COMPUTE: self._multiplied(X_masked).sub_(of_mask),  # it is checked when the mask is taken away
            MASK: of_mask,
            UNMASKED: self._multiplied(X_star),
        }
        self.row_norm = float(torch.linalg.vector_norm(self._products[UNMASKED], dtype=torch.float64))
        self.row_norm /= math.sqrt(self._mixing.rows)

    def product(self, party: str) -> Tensor:
        """What an honest party's product (m, q) is when it is checked."""
        return self._products[party]

    def excess(self, party: str) -> Callable[[Tensor], float]:
        """A fresh probe of that party's product: of a product, its deviation over the tolerance."""
        dtype = torch.float32 if party == UNMASKED else torch.float64
        masks = DEVIATION if party == COMPUTE else 0.0
        probe = self._verifiers[dtype].probe(transpose=False, mask_size=masks)
        if party == MASK:
            of_masks = kernels.project(self._r, probe.V).images
            return lambda product: probe.excess(product, of_masks, DEVIATION, torch.float64)
        U, size = self._mixing.image(self._x, probe.V), self._mixing.size
        return lambda product: probe.excess(product, U, size, torch.float32)

    def tolerance(self, party: str) -> float:
        """tau of the first row of that party's honest product."""
        masks = DEVIATION if party == COMPUTE else 0.0
        probe = self._verifiers[torch.float64].probe(transpose=False, mask_size=masks)
        scale, dtype = (DEVIATION, torch.float64) if party == MASK else (self._mixing.size, torch.float32)
        return float(probe.tolerance(self._products[party], scale, dtype)[0])

    def _multiplied(self, rows: Tensor) -> Tensor:
        out = torch.empty(rows.shape[0], self._W.shape[1], dtype=rows.dtype)
        self._computer.multiply(rows, self._W, out, transpose=False)
        return out


def _smallest_caught(request: MaskedRequest, party: str, change: Tensor) -> float:
    """The norm of a row's change, in one direction, from which one drawing of the vectors catches it."""
    product, excess = request.product(party), request.excess(party)
    passes, caught = (size * request.row_norm for size in _SIZES)
    while caught > 1.01 * passes:
        size = math.sqrt(passes * caught)
        if excess(product + size * change.to(product.dtype)) <= 1:
            passes = size
        else:
            caught = size
    return caught


def one_element(product: Tensor, stream: SecretStream) -> Tensor:
    """A change (m, q) of one element by 1."""
    change = torch.zeros_like(product)
    change[0, 0] = 1
    return change


def two_that_cancel(product: Tensor, stream: SecretStream) -> Tensor:
    """A change of two elements by 1 and -1."""
    change = one_element(product, stream)
    change[0, 1] = -1
    return change


def noise(product: Tensor, stream: SecretStream) -> Tensor:
    """A change of every element by a random number of variance 1."""
    return stream.normal(*product.shape, dtype=product.dtype)


def _in_its_own_direction(product: Tensor, stream: SecretStream) -> Tensor:
    return torch.cat([product[:1], torch.zeros_like(product[1:])])


KINDS = {
    "one element": one_element,
    "two elements that cancel": two_that_cancel,
    "one row, in its own direction": _in_its_own_direction,
    "all rows, noise": noise,
}
"""How a product (m, q) is changed; rows that are, by a change of norm 1."""
