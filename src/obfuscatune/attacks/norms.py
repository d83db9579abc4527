"""A rotation keeps lengths, and a public embedding table says whose length that is."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.attacks.base import Attacker, Finding, Target
from obfuscatune.attacks.knowledge import Knowledge, PublicBase
from obfuscatune.attacks.scoring import TokenGuess, score_tokens
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import WorkerView


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
    lengths = base.inputs[0].norm(dim=1)
    tokens = torch.unique(base.tokens)
    return tokens, torch.stack([lengths[base.tokens == token].median() for token in tokens])
