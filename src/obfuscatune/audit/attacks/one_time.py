"""What gives one-time masks away: one that hides two rows, and what it leaves free of a row that it hides.

    reuse    X'_1 - X'_2  =  X*_1 - X*_2         where both lie under one r: small, where another r leaves it large
    gaps     X' mod 2^k   =  X* mod 2^k          where r is a multiple of 2^k, or has few bits: 24 if drawn in float32
             X' v         =  X* v                where r has nothing along v

Neither is seen by attacks on X' as it is: beside r, X* is smaller than what float32 would round away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, Finding, Target
from obfuscatune.audit.attacks.geometry import similarities
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.linkage import MOST_CALLS, DecodingLinkage, PairGuess
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

NEAR = 2.0**-20
"""Distance of two rows over their length, below which one mask hides both: no two independent rows are so near."""
SCALED = 16.0
"""Root mean square of rows that no mask hides, at most: the enclave scales them to about 1."""
QUIET = 2.0**-40
"""Variance along a direction that masks leave free, against the mean."""
BITS = range(4, 50)
"""That masks may have, from the highest of the rows' size, or from each element's own."""


@dataclass(frozen=True)
class ReuseGuess:
    """Calls, by index, of which a row is thought to lie under the mask of another row; and how many there were."""

    under_one: frozenset[int]
    calls: int


class ReusedMasks:
    """Looks for two rows that are nearly one: of any calls, layers, directions and epochs, if they are as wide."""

    name = "reused-masks"
    needs = Attacker.CLOSED
    target = Target.TOKENS
    measure = "share of calls with a row that is, but for a millionth, the row of another call"
    source = "two-time pads: Benson 2001, The Venona Story"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> ReuseGuess:
        """Rows in the order of their first elements: of two that are nearly one, no other lies between."""
        by_width: dict[int, list[SeenCall]] = {}
        for call in view.calls:
            by_width.setdefault(call.width, []).append(call)
        found: set[int] = set()
        for calls in by_width.values():
            found |= _nearly_one(calls)
        return ReuseGuess(frozenset(found), len(view.calls))

    def score(self, guess: ReuseGuess, truth: Truth) -> Finding:
        """Two masks, or two unlike rows, are never so near: what was found needs no other proof."""
        value = len(guess.under_one) / guess.calls
        return Finding(value, 0.0, 1.0, guess.calls, 1 / guess.calls)


def _nearly_one(calls: Sequence[SeenCall]) -> set[int]:
    """Calls that have a row which is `NEAR` one of another call."""
    firsts = torch.cat([call.rows[:, 0] for call in calls])
    owners = [(number, row) for number, call in enumerate(calls) for row in range(call.count)]
    order = firsts.argsort()
    size = float(firsts.square().mean().sqrt())
    close = (firsts[order].diff() < 4 * NEAR * size).nonzero().flatten().tolist()
    found: set[int] = set()
    for place in close:
        (a, i), (b, j) = owners[int(order[place])], owners[int(order[place + 1])]
        if a == b:
            continue
        first, second = calls[a].rows[i], calls[b].rows[j]
        if float((first - second).norm()) < NEAR * float(first.norm()):
            found |= {calls[a].index, calls[b].index}
    return found


class MaskGaps(DecodingLinkage):
    """Compares decoding steps by what masks leave free of them: directions without a mask, and low bits."""

    name = "mask-gaps"
    source = "ours; Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Similarities of what is left of the calls of the first layer."""
        calls = view.decoding(0)[:MOST_CALLS]
        return PairGuess([(call.index, 0) for call in calls], similarities(uncovered(calls)))


def uncovered(calls: Sequence[SeenCall]) -> list[SeenCall]:
    """The calls without their masks, as far as these have gaps; as they are where they are too small to have masks."""
    rows = torch.cat([call.rows for call in calls])
    size = float(rows.square().mean().sqrt())
    if size <= SCALED:
        return list(calls)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    quiet = vectors[:, values < QUIET * size**2]
    if len(rows) > 2 * rows.shape[1] and quiet.shape[1]:
        return [replace(call, sent=call.rows @ quiet, mask=None) for call in calls]
    grid = min(_grids(rows), key=lambda it: _fullness(rows, it))
    left = _residues(rows, grid).split([call.count for call in calls])
    return [replace(call, sent=part, mask=None) for call, part in zip(calls, left, strict=True)]


def _grids(rows: Tensor) -> Iterator[Tensor]:
    """Powers of two that masks under rows (n, p) may be multiples of: for all elements, or (n, p) for each its own."""
    exponents = rows.frexp().exponent
    for bits in BITS:
        yield torch.exp2(exponents.max().double() - bits)
        yield torch.exp2(exponents.double() - bits)


def _residues(rows: Tensor, grid: Tensor) -> Tensor:
    """What is left beside multiples of `grid`, half of it at most; exact."""
    return torch.sub(rows, grid * (rows / grid).round())


def _fullness(rows: Tensor, grid: Tensor) -> float:
    """Root mean square of residues over that of uniform ones: masks without gaps have 1."""
    return float((_residues(rows, grid) / grid).square().mean().sqrt()) * 12**0.5
