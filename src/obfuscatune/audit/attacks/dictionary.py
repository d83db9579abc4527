"""What the public model makes of public text, looked for in the traffic.

By rows, once R_in is known: then text lies open. By lengths: a rotation keeps them, and a public embedding table says
whose length that is. By second moments: that of a call is a sum over its tokens, which non-negative least squares takes
apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import align, orthonormal_rows
from obfuscatune.audit.attacks.knowledge import Knowledge, PublicBase
from obfuscatune.audit.attacks.scoring import TokenGuess, Truth, score_tokens
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

MOST_EXEMPLARS = 8000


class DictionaryMembership:
    """Aligns the first layer with the public one, and takes the public row that lies nearest to each call's rows."""

    name = "dictionary-membership"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of generated tokens named"
    source = "ours; arXiv 2505.18332 for hidden states against a vocabulary"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """For each decoding step the token whose public row is most within what crossed."""
        base = knowledge.the_base()
        exemplars = base.inputs[:MOST_EXEMPLARS] @ align(view, base, 0).R_in
        exemplars = torch.nn.functional.normalize(exemplars, dim=1)
        guess = {}
        for call in view.decoding(0):
            best = int(_presence(exemplars, call).argmax())
            guess[call.index] = (int(base.tokens[best]),)
        return TokenGuess(guess)

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the tokens."""
        return score_tokens(guess, truth)


def _presence(unit: Tensor, call: SeenCall) -> Tensor:
    """How much of each unit row (N, p) lies in a call: in its row space or, where that is full, in its moment."""
    m, p = call.count, call.width
    within = orthonormal_rows(call.rows) if m < p else call.rows
    presence: Tensor = torch.linalg.vector_norm(unit @ within.T, dim=1)
    return presence


class OutputMatching:
    """Takes products for plain ones, as the paper leaves queries, keys and values, and looks them up."""

    name = "plain-outputs"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of tokens named"
    source = "arXiv 2505.18332; attention-score fingerprints see the same queries and keys"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """For each product row of the first layer the token whose public product points the same way."""
        base = knowledge.the_base()
        products = base.inputs[:MOST_EXEMPLARS] @ base.weights[0]
        exemplars = torch.nn.functional.normalize(products, dim=1)
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        guess = {}
        for call in view.forward(0):
            products = view.products(call)[: max(1, call.count - hidden)]
            seen = torch.nn.functional.normalize(products, dim=1)
            guess[call.index] = tuple(base.tokens[(seen @ exemplars.T).argmax(1)].tolist())
        return TokenGuess(guess)

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the tokens."""
        return score_tokens(guess, truth)


class NormMatching:
    """Names each row after the token whose rows in the public model are as long."""

    name = "norm-matching"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of tokens named"
    source = "arXiv 2505.18332 (vocabulary matching), by lengths alone"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """The nearest length for every row that is seen; mixed, for decoding steps, from the trace of their moment."""
        tokens, lengths = _typical_lengths(knowledge.the_base())
        scheme = knowledge.scheme
        guess: dict[int, tuple[int, ...]] = {}
        for call in view.decoding(0) if scheme.mixing else view.forward(0):
            seen = call.rows.norm(dim=1)
            if scheme.mixing:  # shield rows are as long as the row is, on average
                seen = (call.rows.square().sum() / call.count).sqrt()[None]
            nearest = (seen[:, None] - lengths[None]).abs().argmin(1)
            guess[call.index] = tuple(tokens[nearest].tolist())
        return TokenGuess(guess)

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the tokens."""
        return score_tokens(guess, truth)


def _typical_lengths(base: PublicBase) -> tuple[Tensor, Tensor]:
    """Tokens of the public text, and the median length of each one's rows at the first layer."""
    lengths = base.inputs.norm(dim=1)
    tokens = torch.unique(base.tokens)
    return tokens, torch.stack([lengths[base.tokens == token].median() for token in tokens])


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
    measure = "share of a call's tokens that are in the guessed bag; of the larger of the two"
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
        """Overlap of bags; chance is that with other calls' bags of as many tokens. Single tokens are no bag.

        Where calls are filled up with further shield rows, too large a bag is guessed: it is held against its own size.
        """
        guess = BagGuess({it: bag for it, bag in guess.counts.items() if truth.calls[it].phase != "decoding"})
        if not guess.counts:
            raise CannotRun("no call of several tokens")
        size = max(len(bag) for bag in guess.counts.values())
        size = max(size, 1 + max(max(truth.calls[index].tokens) for index in guess.counts))
        guessed, true = [], []
        for index, bag in guess.counts.items():
            guessed.append(torch.nn.functional.pad(bag, (0, size - len(bag))))
            true.append(torch.bincount(torch.tensor(truth.calls[index].tokens), minlength=size).double())
        a, b = torch.stack(guessed)[:, None], torch.stack(true)[None]
        overlap = torch.minimum(a, b).sum(2) / torch.maximum(a.sum(2), b.sum(2))
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
