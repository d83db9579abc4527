"""Attacks on an adapter that lies on the worker: on what was trained on, by its gradients, and on the adapter itself.

Each gradient is a sum over the tokens of a step, as a server sees it in federated learning: the columns of dA* lie in
the span of the step's inputs, the rows of dB* in that of the gradients of its outputs. So they tell of tokens even
where no single row could be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Recovered, Target
from obfuscatune.audit.attacks.geometry import Aligned, align_one_sided, orthonormal_rows
from obfuscatune.audit.attacks.knowledge import Knowledge, PublicBase
from obfuscatune.audit.attacks.replay import StepGradients, replay
from obfuscatune.audit.attacks.scoring import SHOWN_TEXTS, Truth, cosine, score_pairs
from obfuscatune.audit.attacks.view import WorkerView

LEAST = 1e-9
"""Of a gradient against the largest: below it there is none, as of A where B is still zero."""


@dataclass(frozen=True)
class PresenceGuess:
    """For each step how much each of `tokens` (T,) seems to be in it: (steps, T); and the step's forward calls."""

    tokens: Tensor
    steps: tuple[tuple[int, ...], ...]
    scores: Tensor


class AdapterInputs:
    """Looks for each token's row in the span of the first layer's dA*."""

    name = "adapter-inputs"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "AUC: tokens that a training step has against others, from the adapter's gradients alone"
    source = "ours; BiSR, arXiv 2409.00960, and DAGER, arXiv 2405.15586, for gradients' spans"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PresenceGuess:
        """Tokens whose public row lies within."""
        base = knowledge.the_base()
        tokens, rows = base.typical_rows()
        steps = replay(view, 0).steps
        return _presence(tokens, rows @ _sides(view, base, 0).R_in, steps, lambda it: it.A.T)

    def score(self, guess: PresenceGuess, truth: Truth) -> Finding:
        """Against the step's tokens."""
        return _score(guess, truth, ahead=0)


class AdapterLabels:
    """Looks for each token's output embedding in the span of the last layer's dB*."""

    name = "adapter-labels"
    needs = Attacker.PUBLIC_BASE
    target = Target.TOKENS
    measure = "AUC: tokens that a training step predicts against others, from the adapter's gradients alone"
    source = "BiSR, arXiv 2409.00960; iDLG, arXiv 2001.02610"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> PresenceGuess:
        """Tokens whose direction in the logits lies within."""
        base, last = knowledge.the_base(), view.layers - 1
        steps = replay(view, last).steps
        R_out = _sides(view, base, last).R_out
        if base.head.shape[1] != R_out.shape[0]:
            raise CannotRun("the last layer does not write to the residual stream")
        directions = (base.head - base.head.mean(0)) @ R_out
        return _presence(torch.arange(len(directions)), directions, steps, lambda it: it.B)

    def score(self, guess: PresenceGuess, truth: Truth) -> Finding:
        """Against the tokens that follow."""
        return _score(guess, truth, ahead=1)


@dataclass(frozen=True)
class DeltaGuess:
    """For each layer what fine-tuning is thought to have added to W, (p, q)."""

    deltas: dict[int, Tensor]


class AdapterRecovery:
    """Turns the factors back that the worker holds: the fruit of the fine-tuning itself."""

    name = "adapter-recovery"
    needs = Attacker.PUBLIC_BASE
    target = Target.WEIGHTS
    measure = "cosine of the guessed and the true change that the adapter makes"
    source = "Schönemann 1966, for the one secret side"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> DeltaGuess:
        """R_in s A* B* R_outᵀ of each layer, one of the two secret bases being 1."""
        base = knowledge.the_base()
        deltas = {}
        for adapter in view.adapters:
            change = adapter.delta(base.weights[adapter.layer].shape[1])
            if change is not None:
                sides = _sides(view, base, adapter.layer)
                deltas[adapter.layer] = sides.R_in @ change @ sides.R_out.T
        if not deltas:
            raise CannotRun("no adapter lies on the worker")
        return DeltaGuess(deltas)

    def score(self, guess: DeltaGuess, truth: Truth) -> Finding:
        """Mean over layers."""
        cosines = [cosine(delta, truth.adapters[layer]) for layer, delta in guess.deltas.items()]
        elements = min(delta.numel() for delta in guess.deltas.values())
        spread = float(torch.tensor(cosines).std()) if len(cosines) > 1 else 0.0
        error = max(spread, elements**-0.5) / len(cosines) ** 0.5
        return Finding(fmean(cosines), 0.0, 1.0, len(cosines), error)


def _sides(view: WorkerView, base: PublicBase, layer: int) -> Aligned:
    """Adapters lie on the worker where one side of a layer is plain; which one, the fit tells."""
    W_star = view.matrices[view.forward(layer)[-1].matrix].W_star
    return align_one_sided(base.weights[layer], W_star)


def _presence(
    tokens: Tensor, rows: Tensor, steps: tuple[StepGradients, ...], of: Callable[[StepGradients], Tensor]
) -> PresenceGuess:
    """Share of each row (T, p) that lies in the span of each step's gradient (r, p), against the row's own mean."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    gradients = [of(step) for step in steps]
    largest = max(float(it.norm()) for it in gradients)
    kept = [number for number, it in enumerate(gradients) if float(it.norm()) > LEAST * largest]
    if len(kept) < 2:
        raise CannotRun("fewer than two steps have a gradient")
    shares = torch.stack([(unit @ orthonormal_rows(gradients[number]).T).square().sum(1) for number in kept])
    return PresenceGuess(tokens, tuple(steps[number].calls for number in kept), shares - shares.mean(0))


def _score(guess: PresenceGuess, truth: Truth, ahead: int) -> Finding:
    present = torch.zeros_like(guess.scores, dtype=torch.bool)
    recovered = []
    for number, calls in enumerate(guess.steps):
        true = {token for call in calls for token in truth.calls[call].tokens[ahead:]}
        present[number] = torch.tensor([token in true for token in guess.tokens.tolist()])
        best = guess.tokens[guess.scores[number].topk(int(present[number].sum())).indices].tolist()
        recovered.append(Recovered(truth.text_of(sorted(true)), truth.text_of(sorted(best))))
    finding = score_pairs(guess.scores.flatten(), present.flatten())
    return replace(finding, recovered=tuple(recovered[-SHOWN_TEXTS:]))
