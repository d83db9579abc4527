"""Attacks on W from W*: what the singular values are worth alone, and what a public relative adds.

With a public base the question is not how near a guess is to W, which the base itself is, but how much of the
difference it gets: the cosine of the guessed and the true fine-tuning delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, Finding, Target
from obfuscatune.audit.attacks.geometry import align, align_one_sided
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Truth, cosine
from obfuscatune.audit.attacks.view import WorkerView

MOST_LAYERS = 4
"""Layers that are attacked: one block, with each kind of matrix in it."""


@dataclass(frozen=True)
class WeightGuess:
    """A W (p, q) for each layer."""

    weights: Mapping[int, Tensor]


def first_matrices(view: WorkerView) -> dict[int, Tensor]:
    """W* of the first layers, as it was last sent."""
    matrices: dict[int, Tensor] = {}
    for matrix in view.matrices:
        if matrix.layer is not None and matrix.layer < MOST_LAYERS:
            matrices[matrix.layer] = matrix.W_star
    return matrices


def score_delta(guess: WeightGuess, truth: Truth) -> Finding:
    """Mean cosine of guessed and true differences from the public base; the guess of the base itself scores 0."""
    cosines, errors, own = [], [], []
    for layer, W in guess.weights.items():
        true, base = truth.weights[layer], truth.bases[layer]
        cosines.append(cosine(W - base, true - base))
        errors.append(float((W - true).norm() / true.norm()))
        own.append(float((base - true).norm() / true.norm()))
    elements = min(W.numel() for W in guess.weights.values())
    spread = float(torch.tensor(cosines).std()) / len(cosines) ** 0.5 if len(cosines) > 1 else 0.0
    details = {"relative error": fmean(errors), "relative error of the base": fmean(own)}
    return Finding(fmean(cosines), 0.0, 1.0, len(cosines), max(spread, elements**-0.5), details)


class SingularValues:
    """The best that W* alone gives under dense rotations: the right spectrum in a random basis."""

    name = "singular-values"
    needs = Attacker.CLOSED
    target = Target.WEIGHTS
    measure = "cosine of guessed and true W"
    source = "the invariants of an orthogonal equivalence"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> WeightGuess:
        """W* itself: its basis is as good as any."""
        return WeightGuess(first_matrices(view))

    def score(self, guess: WeightGuess, truth: Truth) -> Finding:
        """Against W; the sign of a guess is anybody's."""
        cosines = [cosine(W, truth.weights[layer]) for layer, W in guess.weights.items()]
        errors = [float((W - truth.weights[it]).norm() / truth.weights[it].norm()) for it, W in guess.weights.items()]
        elements = min(W.numel() for W in guess.weights.values())
        details = {"relative error": fmean(errors), "relative error of guessing zero": 1.0}
        return Finding(fmean(cosines), 0.0, 1.0, len(cosines), (elements * len(cosines)) ** -0.5, details)


class OneSidedProcrustes:
    """Takes one side for plain, as the paper leaves it, and solves for the other in one SVD."""

    name = "one-sided-procrustes"
    needs = Attacker.PUBLIC_BASE
    target = Target.WEIGHTS
    measure = "cosine of guessed and true fine-tuning delta"
    source = "Schönemann 1966"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> WeightGuess:
        """For each layer the side that fits better."""
        guess = {}
        for layer, W_star in first_matrices(view).items():
            sides = align_one_sided(knowledge.the_base().weights[layer], W_star)
            guess[layer] = sides.R_in @ W_star @ sides.R_out.T
        return WeightGuess(guess)

    def score(self, guess: WeightGuess, truth: Truth) -> Finding:
        """By the delta."""
        return score_delta(guess, truth)


class TwoSidedAlignment:
    """Matches Gram matrices on both sides, and signs by the covariance of the traffic."""

    name = "two-sided-alignment"
    needs = Attacker.PUBLIC_BASE
    target = Target.WEIGHTS
    measure = "cosine of guessed and true fine-tuning delta"
    source = "ours; Umeyama 1988 for matching by eigenvectors"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> WeightGuess:
        """R_in W* R_outᵀ of each layer."""
        guess = {}
        for layer, W_star in first_matrices(view).items():
            aligned = align(view, knowledge.the_base(), layer)
            guess[layer] = aligned.R_in @ W_star @ aligned.R_out.T
        return WeightGuess(guess)

    def score(self, guess: WeightGuess, truth: Truth) -> Finding:
        """By the delta."""
        return score_delta(guess, truth)


class ArrowMatch:
    """Matches rows by their directions: made for schemes that permute and scale."""

    name = "arrowmatch"
    needs = Attacker.PUBLIC_BASE
    target = Target.WEIGHTS
    measure = "cosine of guessed and true fine-tuning delta"
    source = "ArrowMatch, USENIX Security 2025"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> WeightGuess:
        """Rows of W*, each in the place and of the length of the public row that it points along."""
        guess = {}
        for layer, W_star in first_matrices(view).items():
            W = knowledge.the_base().weights[layer]
            directions = torch.nn.functional.normalize(W, dim=1) @ torch.nn.functional.normalize(W_star, dim=1).T
            places, rows = linear_sum_assignment(-directions.abs().numpy())
            matched = torch.empty_like(W)
            for place, row in zip(places, rows, strict=True):
                along = float(directions[place, row].sign())
                matched[place] = along * W_star[row] * (W[place].norm() / W_star[row].norm())
            guess[layer] = matched
        return WeightGuess(guess)

    def score(self, guess: WeightGuess, truth: Truth) -> Finding:
        """By the delta."""
        return score_delta(guess, truth)
