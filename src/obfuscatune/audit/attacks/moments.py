"""Which calls carry the same text, by the second moments of whole calls: mixing does not change these.

    X_star^T X_star  =  R_in^T (x^T x) R_in  +  N^T N          for every A, in one basis from call to call

1. Drop the d largest singular directions of each call: loud shield rows N are these.
2. Whiten what is left by its mean over calls, so that what all texts have in common counts for little.
3. Compare calls by the cosine of what is left, less its mean.

The worker does not know d where a call is filled up with shield rows. Several are tried, and the attacker keeps the one
whose scores stand out most: pairs of equal calls are few and score high, so the scores are skewed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.linkage import MOST_CALLS, PairGuess, of_phase
from obfuscatune.audit.attacks.scoring import Phase, TrueCall, Truth, pairs_of, same, score_pairs
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

SHARES_DROPPED = (0.25, 0.5, 0.625, 0.75, 0.875)
"""Of a call's singular directions, where their number is not known from the profile."""
RIDGE = 0.01
"""Of the mean eigenvalue, added before whitening."""


@dataclass(frozen=True)
class Spectra:
    """Singular values (calls, r), falling, and right singular vectors (calls, r, p) of calls of one size."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, calls: Sequence[SeenCall]) -> Spectra:
        """Decompose each call; those that have fewer rows than others are filled up with zeros."""
        most = max(call.count for call in calls)
        padded = [torch.nn.functional.pad(call.rows, (0, 0, 0, most - call.count)) for call in calls]
        _, values, vectors = torch.linalg.svd(torch.stack(padded), full_matrices=False)
        return cls(values, vectors)

    def residual(self, dropped: int) -> Tensor:
        """Second moments (calls, p, p), of trace 1, of what remains without the `dropped` largest directions."""
        kept = self.values[:, dropped:, None] * self.vectors[:, dropped:]
        moments = kept.transpose(1, 2) @ kept
        return moments / moments.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)[:, None, None]


def numbers_dropped(calls: Iterable[SeenCall], knowledge: Knowledge) -> list[int]:
    """How many directions may be worth dropping: none, the profile's shield rows, shares of the rank."""
    rank = min(min(call.count, call.width) for call in calls)
    shield = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
    numbers = {0, shield, *(round(share * rank) for share in SHARES_DROPPED)}
    return sorted(number for number in numbers if number < rank)


def whitener(moments: Tensor) -> Tensor:
    """G (p, p) with G mean G = 1, but for the ridge, for moments (calls, p, p)."""
    values, vectors = torch.linalg.eigh(moments.mean(0))
    values = values.clamp_min(0) + RIDGE * values.mean()
    G: Tensor = vectors / values.sqrt() @ vectors.T
    return G


def skewness(scores: Tensor) -> float:
    """Third standardised moment of (n,): how far a few of the scores stand out above the others."""
    centred = scores - scores.mean()
    return float(centred.pow(3).mean() / centred.square().mean().clamp_min(1e-300) ** 1.5)


def moment_cosines(calls: Sequence[SeenCall], numbers: Sequence[int]) -> Tensor:
    """For all pairs i < j of calls, how alike their whitened residual moments are, at the best of the `numbers`."""
    spectra = Spectra.of(calls)
    i, j = pairs_of(len(calls))
    tried = []
    for dropped in numbers:
        moments = spectra.residual(dropped)
        G = whitener(moments)
        flat = (G @ moments @ G).flatten(1)
        unit = torch.nn.functional.normalize(flat - flat.mean(0), dim=1)
        tried.append((unit @ unit.T)[i, j])
    return max(tried, key=skewness)


@dataclass(frozen=True)
class MomentLinkage:
    """Drops the loudest directions of each call, whitens the second moment of the rest, and compares calls."""

    name: str
    target: Target
    measure: str
    phase: Phase
    calls: Callable[[WorkerView], list[SeenCall]]
    """Those of the first layer that are compared."""
    label: Callable[[TrueCall], object]
    """What is equal for two calls that belong together."""
    needs: ClassVar[Attacker] = Attacker.CLOSED
    source: ClassVar[str] = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Cosines of all pairs of calls."""
        calls = self.calls(view)[:MOST_CALLS]
        if len(calls) < 3:
            raise CannotRun("fewer than three calls to compare")
        if self.phase == "training" and len({call.count for call in calls}) > 1:
            raise CannotRun("examples of different lengths, which tell them apart without any attack")
        return PairGuess([(call.index, 0) for call in calls], moment_cosines(calls, numbers_dropped(calls, knowledge)))

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against equality of the labels, among calls of the phase."""
        guess = of_phase(guess, truth, self.phase)
        return score_pairs(guess.scores, same([self.label(truth.calls[call]) for call, _ in guess.things]))


DECODING_MOMENTS = MomentLinkage(
    "moments-decoding",
    Target.TOKENS,
    "AUC: pairs of decoding steps with equal tokens against others",
    "decoding",
    lambda view: view.decoding(0),
    lambda call: call.tokens,
)
PROMPT_MOMENTS = MomentLinkage(
    "moments-prompts",
    Target.STRUCTURE,
    "AUC: pairs of prompts with one beginning against others",
    "prompt",
    lambda view: view.prompts(0),
    lambda call: call.tokens[:4],
)
EXAMPLE_MOMENTS = MomentLinkage(
    "moments-examples",
    Target.STRUCTURE,
    "AUC: pairs of steps on one example against others of equal length",
    "training",
    lambda view: view.training(0),
    lambda call: call.text,
)
