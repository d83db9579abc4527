"""Which calls have a row in common, from traffic alone: their row spaces then meet.

A call of m = n + s rows spans m of p dimensions, whatever A is. Two calls with m_1 + m_2 <= p meet in nothing but what
they share: k common rows are k principal angles of zero. Where m_1 + m_2 > p, any two spaces meet, and nothing follows.
Larger spaces come nearer to each other by chance, so each cosine is held against those of random spaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import orthonormal_rows
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.linkage import EXACT, MOST_CALLS
from obfuscatune.audit.attacks.scoring import Truth, score_pairs
from obfuscatune.audit.attacks.view import WorkerView

DRAWS = 300
PAIRS_AT_ONCE = 2048
ROUNDING = 1e-10
"""Of 1 - c^2 between spaces of float32 rows that meet."""
SAME_ROW = 1 - 1e-9
"""Cosine of two plain rows above which they are one: float32 keeps them within 1e-12."""


@dataclass(frozen=True)
class SharedRowsGuess:
    """How near the row spaces of each pair of calls, by index, come to each other."""

    pairs: Sequence[tuple[int, int]]
    cosines: Tensor
    """(n,): the largest ones between both spaces."""
    scores: Tensor
    """(n,): by how many standard deviations of `_closeness` they are nearer than random spaces of these sizes."""


class SharedRows:
    """Looks for directions that the row spaces of two calls have in common: calls of any phase and of any size."""

    name = "shared-rows"
    needs = Attacker.CLOSED
    target = Target.TOKENS
    measure = "AUC: pairs of calls with a row in common against others"
    source = "ours; Björck & Golub 1973 for principal angles"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> SharedRowsGuess:
        """Smallest principal angles of all pairs of forward calls of the first layer that leave room for each other."""
        calls = view.of_newest_matrix(0)[-MOST_CALLS:]
        p = calls[0].width
        bases = {call.index: orthonormal_rows(call.rows) for call in calls if call.count < p}
        by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for first, second in combinations(bases, 2):
            sizes = len(bases[first]), len(bases[second])
            if sum(sizes) <= p:
                by_size.setdefault(sizes, []).append((first, second))
        if not by_size:
            raise CannotRun("the rows of any two calls fill the space between them, so that all row spaces meet")
        generator = torch.Generator().manual_seed(seed)
        cosines, scores = [], []
        for sizes, pairs in by_size.items():
            largest = _largest_cosines(bases, pairs)
            usual = _closeness(_random_cosines(*sizes, p, generator))
            cosines.append(largest)
            scores.append((_closeness(largest) - usual.mean()) / usual.std())
        return SharedRowsGuess(list(chain(*by_size.values())), torch.cat(cosines), torch.cat(scores))

    def score(self, guess: SharedRowsGuess, truth: Truth) -> Finding:
        """Against the plain rows: whether some row of one call is, but for its scale, a row of the other."""
        indices = {index for pair in guess.pairs for index in pair}
        unit = {index: torch.nn.functional.normalize(truth.calls[index].rows, dim=1) for index in indices}
        shared = torch.tensor([float((unit[a] @ unit[b].T).max()) > SAME_ROW for a, b in guess.pairs])
        exact = guess.cosines > EXACT
        details = {"exact, true": float((exact & shared).sum()), "exact, false": float((exact & ~shared).sum())}
        return score_pairs(guess.scores, shared, details)


def _closeness(cosines: Tensor) -> Tensor:
    """-log(1 - c^2): an exact intersection stands out from near ones."""
    return -torch.log((1 - cosines.square()).clamp_min(ROUNDING))


def _largest_cosines(bases: Mapping[int, Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Between the spaces of each pair, all of the same two dimensions: (n,)."""
    largest = []
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = zip(*pairs[start : start + PAIRS_AT_ONCE], strict=True)
        products = torch.stack([bases[it] for it in first]) @ torch.stack([bases[it].T for it in second])
        largest.append(torch.linalg.matrix_norm(products, ord=2))
    return torch.cat(largest)


def _random_cosines(first: int, second: int, p: int, generator: torch.Generator) -> Tensor:
    """The largest cosines (DRAWS,) between random spaces of those dimensions in p."""
    drawn = torch.randn(DRAWS, p, first + second, dtype=torch.float64, generator=generator)
    a, b = (torch.linalg.qr(part)[0] for part in drawn.split([first, second], dim=2))
    largest: Tensor = torch.linalg.matrix_norm(a.transpose(1, 2) @ b, ord=2)
    return largest
