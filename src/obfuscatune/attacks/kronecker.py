"""Structured transforms have few secrets: is their grid to be seen?

R = Π (Q_a ⊗ Q_b) Π'. Coordinates of the worker that lie in one row or one column of the grid share a factor, so the
products of their loadings are larger: for Haar factors E[R_ki² R_kj²] is three times that of others. Where the plain
covariance is heavier on some coordinates than on others, that shows in the squared elements of Rᵀ C R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.attacks.alignment import align
from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.scoring import pairs_of, score_pairs
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import WorkerView

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
