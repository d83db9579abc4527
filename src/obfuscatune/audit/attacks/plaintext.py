"""Known plaintext: how many known rows give R_in away, and with it every other row?

Known rows x (n, p) lie, rotated, in the row space of what crossed: with P its projector, x R P = x R. Summed over known
calls, R maximises  sum |x R P|²  over orthogonal matrices; polar steps climb it. Unmixed, it is one Procrustes problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import orthonormal_rows, polar
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

WORK = 2.5e10
"""Multiplications that all polar steps for one basis may take: 3,800 steps at p = 64, 60 at p = 256."""
MOST_STEPS = 200
STARTS = 4
ENOUGH = 0.9999
"""Share of the known directions that lies where it was seen: above it, no other start is tried."""
COUNTS = (2, 4, 8, 16)


@dataclass(frozen=True)
class BasisGuess:
    """R_in of the first layer (p, p), by the number of known calls; and the calls that were not known."""

    bases: Mapping[int, Tensor]
    unknown: Sequence[int]


class KnownPlaintext:
    """Learns R_in of the first layer from known calls, and uses it on others."""

    name = "known-plaintext"
    needs = Attacker.KNOWN_PLAINTEXT
    target = Target.STRUCTURE
    measure = "cosine of unseen rows with where R_in is thought to take them"
    source = "ours; arXiv 2602.11088 for the recovery of static bases"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> BasisGuess:
        """Bases from more and more known calls."""
        known = [(view.calls[it.index], it.rows) for it in knowledge.plaintext if view.calls[it.index].layer == 0]
        known = _under_the_newest_matrix(known)
        if not known:
            raise CannotRun("needs calls whose plain rows are known")
        indices = {call.index for call, _ in known}
        unknown = [call.index for call in view.decoding(0) if call.index not in indices]
        counts = sorted({min(count, len(known)) for count in (*COUNTS, len(known))})
        solve = _solve_mixed if knowledge.scheme.mixing else _solve_plain
        tries = {count: STARTS if count == counts[-1] else 1 for count in counts}
        return BasisGuess({count: solve(known[:count], seed, tries[count]) for count in counts}, unknown)

    def score(self, guess: BasisGuess, truth: Truth) -> Finding:
        """|cos| of x R with x R_guess over unseen rows; chance is that of a random direction."""
        rows = torch.cat([truth.calls[index].rows for index in guess.unknown])
        right = torch.cat([truth.rotated(truth.calls[index]) for index in guess.unknown])
        values = {
            count: torch.nn.functional.cosine_similarity(rows @ R, right, dim=1).abs()
            for count, R in guess.bases.items()
        }
        curve = tuple((float(count), float(value.mean())) for count, value in values.items())
        last = values[max(values)]
        chance = (2 / (torch.pi * rows.shape[1])) ** 0.5
        return Finding(float(last.mean()), chance, 1.0, len(rows), float(last.std()) / len(rows) ** 0.5, curve=curve)


def _under_the_newest_matrix(known: list[tuple[SeenCall, Tensor]]) -> list[tuple[SeenCall, Tensor]]:
    """A re-keyed layer has another basis: of the known calls, those that share the last one's."""
    return [it for it in known if it[0].matrix == known[-1][0].matrix]


def _solve_plain(known: Sequence[tuple[SeenCall, Tensor]], _seed: int, _starts: int) -> Tensor:
    return polar(sum((x.T @ call.rows[: len(x)] for call, x in known), torch.zeros(1)))


def _solve_mixed(known: Sequence[tuple[SeenCall, Tensor]], seed: int, starts: int) -> Tensor:
    p = known[0][1].shape[1]
    directions, spaces = [], []
    for call, x in known:
        directions.append(orthonormal_rows(x))
        if call.count < p:
            spaces.append(orthonormal_rows(call.rows))
        else:  # the row space is everything: weigh directions by what crossed in them
            _, values, Vh = torch.linalg.svd(call.rows, full_matrices=False)
            spaces.append(values[:, None] / values[0] * Vh)
    generator = torch.Generator().manual_seed(seed)
    whole = sum(len(x) for x in directions)
    best, reached = torch.eye(p, dtype=torch.float64), 0.0
    steps = max(1, round(WORK / (25 * p**3)))
    for _ in range(min(starts, -(-steps // MOST_STEPS))):
        R = _climb(
            directions,
            spaces,
            min(steps, MOST_STEPS),
            polar(torch.randn(p, p, dtype=torch.float64, generator=generator)),
        )
        inside = sum(float((x @ R @ B.T).square().sum()) for x, B in zip(directions, spaces, strict=True)) / whole
        if inside > reached:
            best, reached = R, inside
        if reached > ENOUGH:
            break
    return best


def _climb(directions: Sequence[Tensor], spaces: Sequence[Tensor], steps: int, R: Tensor) -> Tensor:
    for _ in range(steps):
        pulled = [x.T @ ((x @ R @ B.T) @ B) for x, B in zip(directions, spaces, strict=True)]
        after = polar(torch.stack(pulled).sum(0))
        if float((after - R).norm()) < 1e-8:
            break
        R = after
    return R
