"""Do the separate secret bases of two layers that read the same residual stream align from traffic alone?

Every pass shows P_i, what crossed at one layer, and Q_i, what crossed at the other. If the plain rows of both are about
equal, there is one T with Tᵀ P_i T ≈ Q_i for all passes: R_1ᵀ R_2. It maximises  sum tr(P_i T Q_i Tᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.attacks.alignment import polar
from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.geometry import orthonormal_rows
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import SeenCall, WorkerView

STEPS = 60
STARTS = 2
MOST_CALLS = 180
MOST_ROWS = 8000
"""Of all calls together, where they fill the space."""


@dataclass(frozen=True)
class BasisLink:
    """T (p, p), thought to be R_firstᵀ R_second."""

    first: int
    second: int
    T: Tensor


class BasisStitching:
    """Aligns the first layer with the next that reads the residual stream, over all decoding steps."""

    name = "basis-stitching"
    needs = Attacker.CLOSED
    target = Target.STRUCTURE
    measure = "overlap |tr(Tᵀ R_1ᵀ R_2)| / p of the guessed change of basis with the true one"
    source = "ours; generalised power iteration (Journée et al. 2010)"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> BasisLink:
        """The best of a few starts, the first of which matches the mean moments."""
        if view.layers < 3:
            raise CannotRun("needs two layers on the residual stream")
        first, second = view.decoding(0), view.decoding(2)
        if first[0].width != second[0].width:
            raise CannotRun("the layers have inputs of different widths")
        most = min(MOST_CALLS, max(1, MOST_ROWS // first[0].count))
        first, second = first[:most], second[:most]
        P, Q = _spaces(first), _spaces(second)
        generator = torch.Generator().manual_seed(seed)
        p = P.shape[2]
        starts = [_match_means(P, Q)]
        starts += [polar(torch.randn(p, p, dtype=torch.float64, generator=generator)) for _ in range(STARTS - 1)]
        climbed = [_climb(P, Q, T) for T in starts]
        best = max(climbed, key=lambda it: it[0])
        return BasisLink(0, 2, best[1])

    def score(self, guess: BasisLink, truth: Truth) -> Finding:
        """Against the true change of basis; that of a random one is about 1/p."""
        R_1, R_2 = truth.layers[guess.first].R_in[-1], truth.layers[guess.second].R_in[-1]
        p = R_1.shape[0]
        overlap = abs(float(torch.trace(guess.T.T @ R_1.T @ R_2))) / p
        return Finding(overlap, (2 / torch.pi) ** 0.5 / p, 1.0, 1, 1.0 / p)


def _spaces(calls: list[SeenCall]) -> Tensor:
    """A basis of each call's row space, (calls, r, p); where the rows fill the space, the rows themselves."""
    m, p = calls[0].count, calls[0].width
    if m < p:
        return torch.stack([orthonormal_rows(call.rows) for call in calls])
    return torch.stack([call.rows / call.rows.norm() for call in calls])


def _match_means(P: Tensor, Q: Tensor) -> Tensor:
    """Eigenvectors of the mean projectors, by rank."""
    _, U = torch.linalg.eigh(torch.einsum("crp,crq->pq", P, P))
    _, V = torch.linalg.eigh(torch.einsum("crp,crq->pq", Q, Q))
    T: Tensor = U @ V.T
    return T


def _climb(P: Tensor, Q: Tensor, T: Tensor) -> tuple[float, Tensor]:
    for _ in range(STEPS):
        inner = P @ T @ Q.transpose(1, 2)  # (calls, r, r)
        after = polar(torch.einsum("crp,crs,csq->pq", P, inner, Q))
        if float((after - T).norm()) < 1e-7:
            break
        T = after
    return float((P @ T @ Q.transpose(1, 2)).square().sum()), T
