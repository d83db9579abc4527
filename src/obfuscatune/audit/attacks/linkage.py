"""Which tokens, and which calls, are equal? The first thing that a static substitution gives away.

Row spaces that meet say which calls carry the same text, from call to call and from day to day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import overlaps, similarities
from obfuscatune.audit.attacks.knowledge import Knowledge
from obfuscatune.audit.attacks.scoring import Phase, Truth, pairs_of, same, score_pairs
from obfuscatune.audit.attacks.view import WorkerView

EXACT = 1 - 1e-4
"""Cosine above which two directions are one: float32 keeps them within 1e-6."""
MOST_CALLS = 240
MOST_ROWS = 3000


@dataclass(frozen=True)
class PairGuess:
    """Scores of all pairs i < j of the things named by (call, row)."""

    things: Sequence[tuple[int, int]]
    scores: Tensor


def _token(truth: Truth, thing: tuple[int, int]) -> int:
    call, row = thing
    return truth.calls[call].tokens[row]


class RowEquality:
    """Takes each row that is seen for a token's and compares all with all, within calls and across them."""

    name = "equal-rows"
    needs = Attacker.CLOSED
    target = Target.TOKENS
    measure = "AUC: pairs of rows of equal tokens against others"
    source = "the algorithm itself: a static rotation keeps equal rows equal"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Cosines between the rows of the first layer, as many as the call can have tokens."""
        hidden = knowledge.scheme.shield_rows if knowledge.scheme.mixing else 0
        things: list[tuple[int, int]] = []
        rows: list[Tensor] = []
        for call in view.forward(0):
            count = max(1, call.count - hidden)
            rows.append(call.rows[:count])
            things += [(call.index, row) for row in range(count)]
        stacked = torch.cat(rows)
        chosen = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
        unit = torch.nn.functional.normalize(stacked[chosen], dim=1)
        i, j = pairs_of(len(chosen))
        return PairGuess([things[index] for index in chosen.tolist()], (unit @ unit.T)[i, j])

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against the tokens' equality."""
        return _score(guess, truth)


class DecodingLinkage:
    """Compares the row spaces of decoding steps: each holds its token's row, whatever mixes it with shield rows."""

    name = "equal-tokens-decoding"
    needs = Attacker.CLOSED
    target = Target.TOKENS
    measure = "AUC: pairs of decoding steps with equal tokens against others"
    source = "ours; docs/adr/0007"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Similarities of the calls of the first layer."""
        calls = view.decoding(0)[:MOST_CALLS]
        return PairGuess([(call.index, 0) for call in calls], similarities(calls))

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against the tokens' equality; exact pairs are those with a common direction.

        Where lengths do not tell decoding steps from prompts, prompts are left out here: somebody else may tell.
        """
        return _score(of_phase(guess, truth, "decoding"), truth)


def of_phase(guess: PairGuess, truth: Truth, phase: Phase) -> PairGuess:
    """The pairs of which both are of a phase."""
    kept = torch.tensor([truth.calls[call].phase == phase for call, _ in guess.things])
    i, j = pairs_of(len(kept))
    things = [thing for thing, keep in zip(guess.things, kept.tolist(), strict=True) if keep]
    return PairGuess(things, guess.scores[kept[i] & kept[j]])


def _score(guess: PairGuess, truth: Truth) -> Finding:
    kept = [thing[1] < len(truth.calls[thing[0]].tokens) for thing in guess.things]
    i, j = pairs_of(len(kept))
    whole = torch.tensor(kept)[i] & torch.tensor(kept)[j]
    labels = [_token(truth, thing) if keep else -1 for thing, keep in zip(guess.things, kept, strict=True)]
    scores, equal = guess.scores[whole], same(labels)[whole]
    exact = scores > EXACT
    details = {"exact, true": float((exact & equal).sum()), "exact, false": float((exact & ~equal).sum())}
    return score_pairs(scores, equal, details)


class PrefixLinkage:
    """Compares the calls that read prompts: those that begin alike have rows in common."""

    name = "equal-beginnings"
    needs = Attacker.CLOSED
    target = Target.STRUCTURE
    measure = "AUC: pairs of prompts with one beginning against others"
    source = "ours; docs/adr/0007"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Overlaps of the prompts' calls at the first layer."""
        calls = view.prompts(0)
        if len(calls) < 3:
            raise CannotRun("fewer than three prompts")
        return PairGuess([(call.index, 0) for call in calls], overlaps(calls))

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against equality of the first four tokens, among prompts."""
        guess = of_phase(guess, truth, "prompt")
        beginnings = [truth.calls[call].tokens[:4] for call, _ in guess.things]
        return score_pairs(guess.scores, same(beginnings))


class ExampleLinkage:
    """Compares the calls of training steps: an example comes back in every epoch, with other adapters beneath it."""

    name = "equal-examples"
    needs = Attacker.CLOSED
    target = Target.STRUCTURE
    measure = "AUC: pairs of steps on one example against others of equal length"
    source = "ours"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PairGuess:
        """Overlaps of the training calls at the first layer."""
        calls = view.training(0)
        if len({(call.count, call.width) for call in calls}) > 1:
            raise CannotRun("examples of different lengths, which tell them apart without any attack")
        return PairGuess([(call.index, 0) for call in calls], overlaps(calls))

    def score(self, guess: PairGuess, truth: Truth) -> Finding:
        """Against equality of the examples."""
        return score_pairs(guess.scores, same([truth.calls[call].text for call, _ in guess.things]))
