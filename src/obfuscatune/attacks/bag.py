"""The second moment of a call is a sum over its tokens: non-negative least squares takes it apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.attacks.alignment import align
from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import WorkerView

STEPS = 400
MOST_CALLS = 48


@dataclass(frozen=True)
class BagGuess:
    """For each call how often each token occurs, (V,), summing to the number of its tokens."""

    counts: Mapping[int, Tensor]


class BagOfTokens:
    """Writes each call's second moment as a sum of those of tokens, as the public model knows them."""

    name = "bag-of-tokens"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of a call's tokens that are in the guessed bag"
    source = "ours (design, section 2); Lawson & Hanson 1974 for the method"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> BagGuess:
        """Bags of the prompts' and training calls of the first layer."""
        base = knowledge.the_base()
        tokens, prototypes = base.typical_rows()
        prototypes = prototypes @ align(view, base, 0).R_in
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        newest = {call.index for call in view.of_newest_matrix(0)}
        calls = [call for call in view.prompts(0) + view.training(0) if call.index in newest]
        calls = calls[-MOST_CALLS:]
        counts = [max(1, call.count - hidden) for call in calls]
        moments = torch.stack([call.rows.T @ call.rows for call in calls])
        weights = _non_negative(prototypes, moments)
        guess = {}
        for call, count, weight in zip(calls, counts, weights, strict=True):
            bag = torch.zeros(int(tokens.max()) + 1, dtype=torch.float64)
            bag[tokens] = count * weight / weight.sum().clamp_min(1e-12)
            guess[call.index] = bag
        return BagGuess(guess)

    def score(self, guess: BagGuess, truth: Truth) -> Finding:
        """Overlap of bags; chance is that with other calls' bags of as many tokens. Single tokens are no bag."""
        guess = BagGuess({it: bag for it, bag in guess.counts.items() if truth.calls[it].phase != "decoding"})
        if not guess.counts:
            raise CannotRun("no call of several tokens")
        size = max(len(bag) for bag in guess.counts.values())
        size = max(size, 1 + max(max(truth.calls[index].tokens) for index in guess.counts))
        guessed, true = [], []
        for index, bag in guess.counts.items():
            guessed.append(torch.nn.functional.pad(bag, (0, size - len(bag))))
            true.append(torch.bincount(torch.tensor(truth.calls[index].tokens), minlength=size).double())
        overlap = torch.minimum(torch.stack(guessed)[:, None], torch.stack(true)[None]).sum(2)
        overlap = overlap / torch.stack(true).sum(1)[None]
        own = overlap.diagonal()
        lengths = [int(bag.sum()) for bag in true]
        alike = torch.tensor([[a == b for b in lengths] for a in lengths]).fill_diagonal_(False)
        chance = float(overlap[alike].mean()) if bool(alike.any()) else 0.0
        error = float(own.std()) / max(1, len(own)) ** 0.5
        return Finding(float(own.mean()), chance, 1.0, len(own), error)


def _non_negative(prototypes: Tensor, moments: Tensor) -> Tensor:
    """min over c >= 0 of |M - sum c_t v_t v_tᵀ - s 1|² for all calls at once: accelerated projected gradient."""
    p = prototypes.shape[1]
    gram = (prototypes @ prototypes.T) ** 2
    norms = prototypes.square().sum(1)
    gram = torch.cat([torch.cat([gram, norms[:, None]], 1), torch.cat([norms, torch.tensor([float(p)])])[None]])
    right = torch.einsum("tp,cpq,tq->ct", prototypes, moments, prototypes)
    right = torch.cat([right, moments.diagonal(dim1=1, dim2=2).sum(1)[:, None]], 1)
    scale = gram.diagonal().sqrt()
    gram, right = gram / scale / scale[:, None], right / scale
    step = 1.0 / float(torch.linalg.matrix_norm(gram, ord=2))
    x = y = torch.zeros_like(right)
    momentum = 1.0
    for _ in range(STEPS):
        after = (y - step * (y @ gram - right)).clamp_min(0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y = after + (momentum - 1) / following * (after - x)
        x, momentum = after, following
    return (x / scale)[:, :-1]
