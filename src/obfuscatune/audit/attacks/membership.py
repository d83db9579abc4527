"""Which of some documents is in a call: the attacker runs each through the public base, and compares second moments.

1. Align R_in with the public base, as `geometry` says, with the loudest directions of each call dropped first.
2. C_k = R_in^T (x_k^T x_k) R_in for the public rows x_k of document k, each row scaled to length 1.
3. A call shows its moment only on what is left of its space, with projector Q. Compare Q C_k Q with it there, without
   what is common to all documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import align_two_sided
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.linkage import MOST_CALLS
from obfuscatune.audit.attacks.scoring import Truth, score_pairs
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

SHARES_DROPPED = (0.25, 0.5, 0.625, 0.75, 0.875)
"""Of a call's singular directions, where their number is not known from the profile."""


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


def _numbers_dropped(calls: Iterable[SeenCall], knowledge: Knowledge) -> list[int]:
    """How many directions may be worth dropping: none, the profile's shield rows, shares of the rank."""
    rank = min(min(call.count, call.width) for call in calls)
    shield = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
    numbers = {0, shield, *(round(share * rank) for share in SHARES_DROPPED)}
    return sorted(number for number in numbers if number < rank)


@dataclass(frozen=True)
class MembershipGuess:
    """How much each call (by index) seems to hold each document: scores (calls, documents)."""

    calls: Sequence[int]
    documents: Sequence[tuple[int, ...]]
    scores: Tensor


class DocumentMembership:
    """Holds the second moments of known documents, run through the public base, against those of training calls."""

    name = "document-membership"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "AUC: a training call with the document that is in it against calls with others"
    source = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> MembershipGuess:
        """Scores at the number of dropped directions at which they stand out most."""
        base = knowledge.the_base()
        if len(knowledge.documents) < 2:
            raise CannotRun("needs documents of which one may be in a call")
        newest = {call.index for call in view.of_newest_matrix(0)}
        calls = [call for call in view.training(0) if call.index in newest][:MOST_CALLS]
        W, W_star = base.weights[0], view.matrices[calls[0].matrix].W_star
        documents = [base.first_rows(torch.tensor([document]))[0] for document in knowledge.documents]
        spectra = Spectra.of(calls)
        tried = []
        for dropped in _numbers_dropped(calls, knowledge):
            moments = spectra.residual(dropped)
            R_in = align_two_sided(W, W_star, _unit_moment(base.inputs[0]), _anisotropic(moments.mean(0))).R_in
            expected = torch.stack([_unit_moment(x @ R_in) for x in documents])
            tried.append(_scores(moments, expected, spectra.vectors[:, dropped:]))
        scores = max(tried, key=lambda it: _skewness(it.flatten()))
        return MembershipGuess([call.index for call in calls], knowledge.documents, scores)

    def score(self, guess: MembershipGuess, truth: Truth) -> Finding:
        """Against which document each call was made from."""
        held = [truth.calls[index].tokens for index in guess.calls]
        positive = torch.tensor([[tokens == document for document in guess.documents] for tokens in held])
        details = {"documents": float(len(guess.documents)), "calls": float(len(held))}
        return score_pairs(guess.scores.flatten(), positive.flatten(), details)


def _skewness(scores: Tensor) -> float:
    """Third standardised moment of (n,): how far a few of the scores stand out above the others."""
    centred = scores - scores.mean()
    return float(centred.pow(3).mean() / centred.square().mean().clamp_min(1e-300) ** 1.5)


def _unit_moment(rows: Tensor) -> Tensor:
    """Of rows (n, p), each scaled to length 1: (p, p), of trace 1."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit.T @ unit / len(unit)


def _anisotropic(moment: Tensor) -> Tensor:
    """Without its isotropic part, which shield rows add to."""
    return moment - torch.linalg.eigvalsh(moment).median() * torch.eye(len(moment), dtype=moment.dtype)


def _scores(moments: Tensor, expected: Tensor, kept: Tensor) -> Tensor:
    """Cosines (calls, documents) of moments (calls, p, p) with those expected of documents (documents, p, p).

    `kept` (calls, r, p): an orthonormal basis of what remains of each call's space.
    """
    typical = expected.mean(0)
    scores = []
    for moment, basis in zip(moments, kept, strict=True):
        inside = torch.nn.functional.normalize((basis @ (expected - typical) @ basis.T).flatten(1), dim=1)
        scores.append(inside @ (basis @ moment @ basis.T).flatten())
    return torch.stack(scores)
