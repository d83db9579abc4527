"""A gradient of cross-entropy points away from the embedding of the token that was to be predicted."""

from __future__ import annotations

import torch

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import align
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import TokenGuess, Truth, score_tokens
from obfuscatune.audit.attacks.view import WorkerView


class LabelInference:
    """Names for each gradient row of the last layer the token whose output embedding it is most against."""

    name = "label-inference"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "share of trained tokens named"
    source = "BiSR, arXiv 2409.00960, without its later matching of gradients; iDLG, arXiv 2001.02610"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """The tokens that followed, row by row; the last row of a call has none."""
        base, last = knowledge.the_base(), view.layers - 1
        newest = view.of_newest_matrix(last)[0].matrix
        calls = [call for call in view.backward(last) if call.matrix == newest]
        if not calls:
            raise CannotRun("no gradients crossed")
        R_out = align(view, base, last).R_out
        if base.head.shape[1] != R_out.shape[0]:
            raise CannotRun("the last layer does not write to the residual stream")
        directions = torch.nn.functional.normalize((base.head - base.head.mean(0)) @ R_out, dim=1)
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        along = {}
        for call in calls:
            count = max(1, call.count - hidden)
            along[call.index] = torch.nn.functional.normalize(call.rows[:count], dim=1) @ directions.T
        everything = torch.cat(list(along.values()))
        # An alignment leaves the sign of all of R_out open: against one token, along all others a little.
        sign = 1.0 if float(everything.min(1).values.sum() + everything.max(1).values.sum()) < 0 else -1.0
        guess = {index: tuple((sign * rows).argmin(1).tolist())[:-1] for index, rows in along.items()}
        return TokenGuess({index: tokens for index, tokens in guess.items() if tokens})

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the next tokens."""
        return score_tokens(guess, truth, ahead=1)
