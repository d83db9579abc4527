"""Which calls carry the same text? Row spaces that meet say so, from call to call and from day to day."""

from __future__ import annotations

from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.equality import PairGuess, of_phase
from obfuscatune.attacks.geometry import overlaps
from obfuscatune.attacks.knowledge import Knowledge
from obfuscatune.attacks.scoring import same, score_pairs
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import WorkerView


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
