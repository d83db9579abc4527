"""Vocabulary matching: the text of a call, token by token, by running every token of the vocabulary through the base.

arXiv 2505.18332 reads a prompt from permuted hidden states: with the text so far known, it runs each candidate for
the next token through the public model, and takes the one whose hidden state is nearest under a distance that the
permutation does not change. A rotation keeps lengths and inner products, so here the distance is between Gram matrices:

    x_t R_in (x_u R_in)^T  =  x_t x_u^T          for every u <= t

Where rows are mixed, no row is seen by itself, and what is compared means nothing: that is what mixing is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, Finding, Target
from obfuscatune.audit.attacks.knowledge import Knowledge, PublicBase
from obfuscatune.audit.attacks.scoring import TokenGuess, Truth, score_tokens
from obfuscatune.audit.attacks.view import WorkerView

MOST_WORDS = 200
"""The commonest tokens of the public text; others are not tried."""
MOST_CALLS, MOST_TOKENS = 5, 12
WIDE, NARROW = 32, 4
"""Beginnings that are followed: up to the third token, of which lengths alone tell little, and from there on."""
AT_ONCE = 1024


class VocabularyMatching:
    """Reads prompts token by token: the next is the one whose public row has the lengths and products that are seen."""

    name = "vocabulary-matching"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of tokens named"
    source = "arXiv 2505.18332, with Gram matrices for its permutation-invariant distances"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """The beginnings of the first prompts, from their rows as they are seen."""
        base = knowledge.the_base()
        tokens, counts = torch.unique(base.tokens, return_counts=True)
        vocabulary = tokens[counts.argsort(descending=True)[:MOST_WORDS]]
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        guess = {}
        for call in view.prompts(0)[:MOST_CALLS]:
            rows = call.rows[: max(1, call.count - hidden)][:MOST_TOKENS]
            guess[call.index] = tuple(read_text(rows, vocabulary, base).tolist())
        return TokenGuess(guess)

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the tokens."""
        return score_tokens(guess, truth)


def read_text(rows: Tensor, vocabulary: Tensor, base: PublicBase) -> Tensor:
    """Tokens (n,) for rows (n, p) under a rotation: the beginning with the nearest Gram matrix, by beam search."""
    beam = torch.empty(1, 0, dtype=vocabulary.dtype)
    costs = torch.zeros(1, dtype=torch.float64)
    for length in range(1, len(rows) + 1):
        texts = torch.cat(
            [beam.repeat_interleave(len(vocabulary), 0), vocabulary.repeat(len(beam))[:, None]],
            dim=1,
        )
        seen = rows[:length] @ rows[length - 1]
        costs = costs.repeat_interleave(len(vocabulary)) + torch.cat(
            [_distances(base.first_rows(part), seen) for part in texts.split(AT_ONCE)]
        )
        best = costs.argsort()[: WIDE if length < 3 else NARROW]
        beam, costs = texts[best], costs[best]
    return beam[0]


def _distances(candidates: Tensor, seen: Tensor) -> Tensor:
    """(c,): of the last rows' products in candidates (c, t, p) from those seen (t,), in squared lengths of the row."""
    products = (candidates @ candidates[:, -1, :, None])[..., 0]
    return (products - seen).square().sum(1) / seen[-1].square()
