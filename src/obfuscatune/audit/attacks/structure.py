"""The structure of the secret bases: steps towards tokens and weights, from traffic alone.

Grid of a structured transform.  R = Π (Q_a ⊗ Q_b) Π'. Coordinates of the worker that lie in one row or one column of
the grid share a factor, so the products of their loadings are larger: for Haar factors E[R_ki² R_kj²] is three times
that of others. Where the plain covariance is heavier on some coordinates than on others, that shows in the squared
elements of Rᵀ C R.

Stitching of two layers.  Of two that read the same residual stream every pass shows P_i, what crossed at one, and Q_i,
what crossed at the other. If the plain rows of both are about equal, there is one T with Tᵀ P_i T ≈ Q_i for all passes:
R_1ᵀ R_2. It maximises  sum tr(P_i T Q_i Tᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import align, orthonormal_rows, polar
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Truth, pairs_of, score_pairs
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

MOST_CALLS = 40
RATIO = 1.6
"""Above it, against the mean of all, two true coordinates count as sharing a factor."""


@dataclass(frozen=True)
class GridGuess:
    """For all pairs i < j of a layer's coordinates, how much they seem to share a factor."""

    layer: int
    scores: Tensor


class GridFromTraffic:
    """Looks for the grid in W* W*ᵀ and in the second moments of calls."""

    name = "grid-from-traffic"
    needs = Attacker.CLOSED
    target = Target.STRUCTURE
    measure = "AUC: pairs of coordinates that share a factor against others"
    source = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> GridGuess:
        """Squared elements of every moment of the first layer, added up."""
        calls = view.of_newest_matrix(0)[:MOST_CALLS]
        W_star = view.matrices[calls[0].matrix].W_star
        squares = _standardised(W_star @ W_star.T)
        for call in calls:
            squares = squares + _standardised(call.rows.T @ call.rows) / len(calls)
        i, j = pairs_of(squares.shape[0])
        return GridGuess(0, squares[i, j])

    def score(self, guess: GridGuess, truth: Truth) -> Finding:
        """Against the grid, where there is one."""
        return score_pairs(guess.scores, shares_factor(truth.layers[guess.layer].R_in[-1]))


class GridFromBase:
    """Looks for the grid in R_in as the public base gives it: the first step to exact secrets."""

    name = "grid-from-base"
    needs = Attacker.PUBLIC_BASE
    target = Target.STRUCTURE
    measure = "AUC: pairs of coordinates that share a factor against others"
    source = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> GridGuess:
        """Products of squared loadings."""
        squares = align(view, knowledge.the_base(), 0).R_in.square()
        i, j = pairs_of(squares.shape[1])
        return GridGuess(0, (squares.T @ squares)[i, j])

    def score(self, guess: GridGuess, truth: Truth) -> Finding:
        """Against the grid, where there is one."""
        return score_pairs(guess.scores, shares_factor(truth.layers[guess.layer].R_in[-1]))


def shares_factor(R: Tensor) -> Tensor:
    """For all pairs i < j of columns of the true R, whether they lie in one row or column of its grid.

    Raises:
        CannotRun: R has no grid: it is dense, or a product of two.
    """
    p = R.shape[0]
    i, j = pairs_of(p)
    shared = (R.square().T @ R.square())[i, j]
    found = shared > RATIO * float(shared.mean())
    share = float(found.double().mean())
    expected = 2 * (p**0.5 - 1) / (p - 1)  # a row and a column of a square grid
    if not 0.6 < share / expected < 1.6:
        raise CannotRun("the transform has no single grid")
    return found


def _standardised(moment: Tensor) -> Tensor:
    """Squared elements, each against what its row and column have in common."""
    squares = moment.square() / moment.diagonal()[:, None] / moment.diagonal()[None]
    off = squares - torch.diag(squares.diagonal())
    return off / off.mean()


STEPS = 60
STARTS = 2
MOST_PASSES = 180
MOST_ROWS = 8000
"""Of all calls together, where they fill the space."""


@dataclass(frozen=True)
class BasisClient:
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

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> BasisClient:
        """The best of a few starts, the first of which matches the mean moments."""
        if view.layers < 3:
            raise CannotRun("needs two layers on the residual stream")
        first, second = view.decoding(0), view.decoding(2)
        if first[0].width != second[0].width:
            raise CannotRun("the layers have inputs of different widths")
        most = min(MOST_PASSES, max(1, MOST_ROWS // first[0].count))
        first, second = first[:most], second[:most]
        P, Q = _spaces(first), _spaces(second)
        generator = torch.Generator().manual_seed(seed)
        p = P.shape[2]
        starts = [_match_means(P, Q)]
        starts += [polar(torch.randn(p, p, dtype=torch.float64, generator=generator)) for _ in range(STARTS - 1)]
        climbed = [_climb(P, Q, T) for T in starts]
        best = max(climbed, key=lambda it: it[0])
        return BasisClient(0, 2, best[1])

    def score(self, guess: BasisClient, truth: Truth) -> Finding:
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
