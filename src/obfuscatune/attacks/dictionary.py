"""Rows that the public model makes of public text, looked for in the traffic: once R_in is known, text lies open."""

from __future__ import annotations

import torch
from torch import Tensor

from obfuscatune.attacks.alignment import align
from obfuscatune.attacks.base import Attacker, Finding, Target
from obfuscatune.attacks.geometry import orthonormal_rows
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.scoring import TokenGuess, score_tokens
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import SeenCall, WorkerView

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
        exemplars = base.inputs[0][:MOST_EXEMPLARS] @ align(view, base, 0).R_in
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
        products = base.inputs[0][:MOST_EXEMPLARS] @ base.weights[0]
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
