"""Which calls carry the same text, by the second moments of whole calls: mixing does not change these.

    M  =  X_star^T X_star  =  R_in^T (x^T x) R_in  +  N^T N          for every A, in one basis from call to call

1. Take the loudest singular directions of each call away, which loud shield rows N are: (M + tau)^-1. A direction of
   variance v counts 1 / (v + tau), so nobody has to know how many are loud; one that no row has counts most.
2. Whiten by the mean over calls, so that what all calls have in common counts for little.
3. Compare calls by the cosine of what is left, less its mean.
4. Add up over layers and, in training, over both directions: each call of a pass has shield rows of its own, and the
   same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.linkage import MOST_CALLS, PairGuess, of_phase
from obfuscatune.audit.attacks.scoring import Phase, TrueCall, Truth, pairs_of, same, score_pairs
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

MOST_LAYERS = 12
MOST_ELEMENTS = 20_000_000
"""Of all moments of a layer together: 240 calls at p = 256, 60 at p = 576."""
TAU = 1e-3
"""Of the mean variance: where shield rows are eight times as loud as the text, about what is left of the text."""
RIDGE = 0.01
"""Of the mean eigenvalue, added before whitening."""


def quiet_moments(calls: Sequence[SeenCall]) -> Tensor:
    """(M + tau)^-1 (calls, p, p) of each call, with M scaled to a mean variance of 1."""
    moments = torch.stack([call.rows.T @ call.rows for call in calls])
    p = moments.shape[1]
    moments = moments * (p / moments.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300))[:, None, None]
    inverses: Tensor = torch.linalg.inv(moments + TAU * torch.eye(p, dtype=moments.dtype))
    return inverses


def whitener(moments: Tensor) -> Tensor:
    """G (p, p) with G mean(M) G = 1, but for the ridge, for symmetric M (calls, p, p)."""
    values, vectors = torch.linalg.eigh(moments.mean(0))
    values = values.clamp_min(0) + RIDGE * values.mean()
    G: Tensor = vectors / values.sqrt() @ vectors.T
    return G


def whitened_cosines(moments: Tensor) -> Tensor:
    """For all pairs i < j of symmetric (calls, p, p): the cosine of their whitened forms less the mean of these."""
    G = whitener(moments)
    flat = (G @ moments @ G).flatten(1)
    unit = torch.nn.functional.normalize(flat - flat.mean(0), dim=1)
    i, j = pairs_of(len(moments))
    return (unit @ unit.T)[i, j]


def standardised_cosines(calls: Sequence[SeenCall]) -> Tensor:
    """For all pairs i < j of calls by one layer: whitened cosines, of mean 0 and variance 1.

    Calls are compared where one W_star, hence one basis, served both; 0 stands for other pairs, and for all where fewer
    than three calls are alike.
    """
    i, j = pairs_of(len(calls))
    scores = torch.zeros(len(i), dtype=torch.float64)
    matrices = torch.tensor([call.matrix for call in calls])
    for matrix in matrices.unique():
        members = [call for call in calls if call.matrix == int(matrix)]
        if len(members) > 2:
            cosines = whitened_cosines(quiet_moments(members))
            chosen = (matrices[i] == matrix) & (matrices[j] == matrix)
            scores[chosen] = (cosines - cosines.mean()) / cosines.std().clamp_min(1e-12)
    return scores


@dataclass(frozen=True)
class MomentLinkage:
    """Takes the loudest directions of each call away, whitens the second moment of the rest, and compares calls."""

    name: str
    target: Target
    measure: str
    phase: Phase
    calls: Callable[[WorkerView, int], list[SeenCall]]
    """Those of one layer that are compared, in the order of the passes."""
    label: Callable[[TrueCall], object]
    """What is equal for two calls that belong together."""
    needs: ClassVar[Attacker] = Attacker.CLOSED
    source: ClassVar[str] = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Sums over layers that are as wide as the first, and over gradients of that width."""
        first = self.calls(view, 0)
        p = first[0].width
        first = first[: min(MOST_CALLS, MOST_ELEMENTS // p**2)]
        if len(first) < 3:
            raise CannotRun("fewer than three calls to compare")
        if self.phase == "training" and len({call.count for call in first}) > 1:
            raise CannotRun("examples of different lengths, which tell them apart without any attack")
        layers = [layer for layer in range(view.layers) if view.forward(layer)[0].width == p][:MOST_LAYERS]
        calls = [self.calls(view, layer) for layer in layers]
        if self.phase == "training":
            gradients = [view.backward(layer) for layer in range(view.layers)]
            calls += [it for it in gradients if len(it) == len(calls[0]) and it[0].width == p][:MOST_LAYERS]
        compared = [standardised_cosines(it[: len(first)]) for it in calls]
        return PairGuess([(call.index, 0) for call in first], torch.stack(compared).sum(0))

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against equality of the labels, among calls of the phase."""
        guess = of_phase(guess, truth, self.phase)
        return score_pairs(guess.scores, same([self.label(truth.calls[call]) for call, _ in guess.things]))


DECODING_MOMENTS = MomentLinkage(
    "moments-decoding",
    Target.TOKENS,
    "AUC: pairs of decoding steps with equal tokens against others",
    "decoding",
    WorkerView.decoding,
    lambda call: call.tokens,
)
PROMPT_MOMENTS = MomentLinkage(
    "moments-prompts",
    Target.STRUCTURE,
    "AUC: pairs of prompts with one beginning against others",
    "prompt",
    WorkerView.prompts,
    lambda call: call.tokens[:4],
)
EXAMPLE_MOMENTS = MomentLinkage(
    "moments-examples",
    Target.STRUCTURE,
    "AUC: pairs of steps on one example against others of equal length",
    "training",
    WorkerView.training,
    lambda call: call.text,
)
