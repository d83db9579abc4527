"""Which of some documents is in a call: the attacker runs each through the public base, and compares second moments.

1. Align R_in with the public base, as `geometry` says, after dropping the loudest singular directions of each call.
2. C_k = R_in^T (x_k^T x_k) R_in for the public rows x_k of document k, each row scaled to length 1.
3. Where document k is in a call, the directions of C_k are loud there, and (M + tau)^-1 of the call, as in `moments`,
   is small on them: compare both, without what is common to all calls and to all documents.

The attacker does not know how many directions of a call are shield rows. Alignments with several are tried, and the
one is kept whose scores stand out most: few calls hold a given document, so the scores are skewed.
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
from obfuscatune.audit.attacks.moments import quiet_moments, whitener
from obfuscatune.audit.attacks.scoring import Truth, score_pairs
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

SHARES_DROPPED = (0.25, 0.5, 0.625, 0.75, 0.875)
"""Of a call's singular directions, where their number is not known from the profile."""


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
        quiet = quiet_moments(calls)
        decomposed = [torch.linalg.svd(call.rows, full_matrices=False)[1:] for call in calls]
        tried = []
        for dropped in _numbers_dropped(calls, knowledge):
            observed = _without_loudest(decomposed, dropped)
            R_in = align_two_sided(W, W_star, _unit_moment(base.inputs), observed).R_in
            tried.append(_scores(quiet, torch.stack([_unit_moment(x @ R_in) for x in documents])))
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


def _without_loudest(decomposed: Sequence[tuple[Tensor, Tensor]], dropped: int) -> Tensor:
    """Mean second moment (p, p) of calls without their largest directions, and without its isotropic part.

    Calls are given as singular values and right singular vectors; shield rows add to the isotropic part.
    """
    p = decomposed[0][1].shape[1]
    mean = torch.zeros(p, p, dtype=torch.float64)
    for values, vectors in decomposed:
        rows = values[dropped:, None] * vectors[dropped:]
        mean += rows.T @ rows / rows.square().sum().clamp_min(1e-300)
    isotropic = torch.linalg.eigvalsh(mean).median() * torch.eye(p, dtype=torch.float64)
    return torch.sub(mean, isotropic)


def _scores(quiet: Tensor, expected: Tensor) -> Tensor:
    """How much each document's moment, of (documents, p, p), is what a call, of quiet (calls, p, p), has: standardised.

    Each document counts by the length of its whitened moment: one with rare directions does not lead them all.
    """
    G = whitener(expected)
    unusual = expected - expected.mean(0)
    lengths = (G @ unusual @ G).flatten(1).norm(dim=1)
    agreement = -(quiet - quiet.mean(0)).flatten(1) @ (unusual.flatten(1) / lengths[:, None]).T
    centred = agreement - agreement.mean(1, keepdim=True)
    return torch.div(centred, centred.std(1, keepdim=True).clamp_min(1e-300))
