"""Known plaintext: how many known rows give R_in away, and with it every other row?

Known rows x (n, p) lie, rotated, in the row space of what crossed: with P its projector, x R P = x R. Summed over known
calls, R maximises  sum |x R P|²  over orthogonal matrices; polar steps climb it. Unmixed, it is one Procrustes problem.

Where rows fill the space, P says nothing, and second moments do: without what all calls have in common, M_k of a call
is about R^T C_k R for C_k of its known rows. So R maximises  sum tr(R^T C_k R M_k).  Its climb starts from eigenvectors
of sums with random weights, the same on both sides, matched by rank. Where there is room, the first climb starts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import agreeing_signs, orthonormal_rows, polar, second_moment
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

WORK = 1e11
"""Multiplications that all steps of one climb may take: by row spaces 240 steps at p = 256, 20 at p = 576."""
MOST_STEPS = 200
STARTS = 4
ENOUGH = 0.9999
"""Share of the known directions that lies where it was seen: above it, no other start is tried."""
COUNTS = (2, 4, 8, 16)
DRAWS = 16
"""Random bases that a guess is held against."""


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
        """|cos| of x R with x R_guess over unseen rows; chance, and its spread, is that of random bases."""
        rows = torch.cat([truth.calls[index].rows for index in guess.unknown])
        right = torch.cat([truth.rotated(truth.calls[index]) for index in guess.unknown])

        def reached(R: Tensor) -> float:
            return float(torch.nn.functional.cosine_similarity(rows @ R, right, dim=1).abs().mean())

        curve = tuple((float(count), reached(R)) for count, R in guess.bases.items())
        generator = torch.Generator().manual_seed(len(rows))
        luck = torch.tensor([reached(_random_basis(rows.shape[1], generator)) for _ in range(DRAWS)])
        value = reached(guess.bases[max(guess.bases)])
        return Finding(value, float(luck.mean()), 1.0, len(rows), float(luck.std()), curve=curve)


def _under_the_newest_matrix(known: list[tuple[SeenCall, Tensor]]) -> list[tuple[SeenCall, Tensor]]:
    """A re-keyed layer has another basis: of the known calls, those that share the last one's."""
    return [it for it in known if it[0].matrix == known[-1][0].matrix]


def _solve_plain(known: Sequence[tuple[SeenCall, Tensor]], _seed: int, _starts: int) -> Tensor:
    return polar(sum((x.T @ call.rows[: len(x)] for call, x in known), torch.zeros(1)))


def _random_basis(p: int, generator: torch.Generator) -> Tensor:
    return polar(torch.randn(p, p, dtype=torch.float64, generator=generator))


def _solve_mixed(known: Sequence[tuple[SeenCall, Tensor]], seed: int, starts: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    best = _by_moments(known, starts, generator)
    roomy = [(call, x) for call, x in known if call.count < call.width]
    if not roomy:
        return best
    p, reached, first = len(best), 0.0, best
    directions, spaces = [orthonormal_rows(x) for _, x in roomy], [orthonormal_rows(call.rows) for call, _ in roomy]
    whole = sum(len(x) for x in directions)
    steps = max(1, round(WORK / (25 * p**3)))
    for start in range(min(starts, -(-steps // MOST_STEPS))):
        R = _random_basis(p, generator) if start else first
        R = _climb(directions, spaces, min(steps, MOST_STEPS), R)
        inside = sum(float((x @ R @ B.T).square().sum()) for x, B in zip(directions, spaces, strict=True)) / whole
        if inside > reached:
            best, reached = R, inside
        if reached > ENOUGH:
            break
    return best


def _by_moments(known: Sequence[tuple[SeenCall, Tensor]], starts: int, generator: torch.Generator) -> Tensor:
    C, M = (torch.stack(moments) for moments in zip(*(_moments(call, x) for call, x in known), strict=True))
    summed = [(C.mean(0), M.mean(0))]
    C, M = C - C.mean(0), M - M.mean(0)
    for weights in torch.randn(starts, len(C), dtype=C.dtype, generator=generator):
        summed.append((torch.einsum("k,kpq->pq", weights, C), torch.einsum("k,kpq->pq", weights, M)))
    steps = max(1, round(WORK / ((25 + 4 * len(C)) * C.shape[1] ** 3) / len(summed)))
    climbed = [_climb_moments(C, M, min(steps, MOST_STEPS), _matched(C, M, *sums)) for sums in summed]
    return max(climbed, key=lambda it: it[0])[1]


def _moments(call: SeenCall, x: Tensor) -> tuple[Tensor, Tensor]:
    return second_moment(x), second_moment(call.rows)


def _matched(C: Tensor, M: Tensor, plain: Tensor, seen: Tensor) -> Tensor:
    """R that takes eigenvectors of `plain` (p, p) to those of `seen`, with the signs on which C and M agree most."""
    U, V = torch.linalg.eigh(plain).eigenvectors, torch.linalg.eigh(seen).eigenvectors
    R: Tensor = (U * agreeing_signs(((U.T @ C @ U) * (V.T @ M @ V)).sum(0))) @ V.T
    return R


def _climb_moments(C: Tensor, M: Tensor, steps: int, R: Tensor) -> tuple[float, Tensor]:
    for _ in range(steps):
        after = polar((C @ R @ M).sum(0))
        if float((after - R).norm()) < 1e-8:
            break
        R = after
    return float(((C @ R) * (R @ M)).sum()), R


def _climb(directions: Sequence[Tensor], spaces: Sequence[Tensor], steps: int, R: Tensor) -> Tensor:
    for _ in range(steps):
        pulled = [x.T @ ((x @ R @ B.T) @ B) for x, B in zip(directions, spaces, strict=True)]
        after = polar(torch.stack(pulled).sum(0))
        if float((after - R).norm()) < 1e-8:
            break
        R = after
    return R
