"""Model stealing: how good a model does W* make, once what is missing around it was trained on public text?

    public base    W as far as W* tells it, for the base's own; the rest trained on
    closed base    W* as it is, frozen; the rest from nothing: embeddings, norms, head, whatever never crossed

Each is held against the same training without what W* says: with the base's own matrices, or with matrices that have
the singular values of W*, which nothing hides, and nothing else of it. The secret model is complete success.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import align, align_one_sided
from obfuscatune.audit.attacks.knowledge import Architecture, Knowledge, PublicBase
from obfuscatune.audit.attacks.scoring import Truth
from obfuscatune.audit.attacks.view import WorkerView
from obfuscatune.protocol.tensors import content_digest

STEPS_ON_BASE = 40
STEPS_FROM_NOTHING = 150
LEAST_STEPS = 5
"""Fewer have no power."""
WORK = 6e7
"""Parameters times steps of one training: 150 steps up to 400,000 parameters, fewer above."""
TEXTS = 8
"""Of one step."""
RATE_ON_BASE, RATE_FROM_NOTHING = 5e-4, 8e-3
TURNS = 3
"""Trainings that the one from nothing is held against."""
SPREAD = 0.02
"""Of the way from chance to success: trainings that differ in nothing but what was drawn may differ by that much."""
PLAUSIBLE = 0.25
"""How far from its base a W may be, over the base's norm, for a reading of W* to be believed."""


@dataclass(frozen=True)
class Thief:
    """Models that came out, token numbers (n, length) -> logits (n, length, V), and how long each was trained."""

    stolen: nn.Module
    without: tuple[nn.Module, ...]
    """The same without what is to be stolen."""
    steps: int


class StealingFromBase:
    """Puts what W* tells of W in the place of the base's matrices."""

    name = "stealing-from-base"
    needs = Attacker.PUBLIC_BASE
    target = Target.WEIGHTS
    measure = "loss on private text, nats per token, against the base that was trained as long"
    source = "ours; Tramer et al. 2016 for stealing by training"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> Thief:
        """The base with W in it, and the base, both trained on public text around these."""
        base, how = knowledge.the_base(), knowledge.the_architecture()
        texts = _texts(knowledge)
        steps = _affordable(STEPS_ON_BASE, how.published())

        def trained(weights: Sequence[Tensor]) -> nn.Module:
            model = how.published()
            names = set(_put(model, how.place(weights)))
            _train(model, names, texts, steps, RATE_ON_BASE, seed)
            return model

        without = how.once((self.name, seed), lambda: trained(base.weights))
        return Thief(trained(_read(view, base)), (without,), steps)

    def score(self, guess: Thief, truth: Truth) -> Finding:
        """By the loss on private text that nothing was trained on."""
        return _score(guess, truth)


class StealingFromNothing:
    """Takes W* for W, and trains all the rest around it."""

    name = "stealing-from-nothing"
    needs = Attacker.PUBLIC_TEXT
    target = Target.WEIGHTS
    measure = "loss on private text, nats per token, against W* in a random basis, trained as long"
    source = "ours; Tramer et al. 2016 for stealing by training"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> Thief:
        """Of one architecture and one draw of all the rest: with W*, and with W* turned at random.

        The latter is the same for all profiles that offload the same layers, and is trained once for all of them; the
        former for all who hold the same W*.
        """
        how, texts = knowledge.the_architecture(), _texts(knowledge)
        steps = _affordable(STEPS_FROM_NOTHING, how.build(seed))
        stars = _newest(view)
        spectra = [torch.linalg.svdvals(W_star) for W_star in stars]
        kept = how.trained.get((self.name, seed))
        if kept is None or not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(kept[0], spectra, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            turned = ([_turned(W_star, generator) for W_star in stars] for _ in range(TURNS))
            kept = spectra, tuple(_around(it, how, texts, seed, steps) for it in turned)
            how.trained[self.name, seed] = kept
        held = self.name, seed, *(content_digest(it.stored) for it in view.matrices)
        return Thief(how.once(held, lambda: _around(stars, how, texts, seed, steps)), kept[1], steps)

    def score(self, guess: Thief, truth: Truth) -> Finding:
        """By the loss on private text."""
        return _score(guess, truth)


def losses(model: nn.Module, texts: Tensor) -> Tensor:
    """Mean next-token loss of each text (n, length), in nats: (n,)."""
    with torch.no_grad():
        return torch.cat([_cross_entropy(model(part), part).mean(1) for part in texts.split(32)])


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """(n, length, V), (n, length) -> (n, length - 1)."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def _texts(knowledge: Knowledge) -> Tensor:
    return torch.tensor(knowledge.the_text().texts)


def _newest(view: WorkerView) -> list[Tensor]:
    """W* of every layer, as it was sent last."""
    return [view.matrices[view.forward(layer)[-1].matrix].W_star for layer in range(view.layers)]


def _read(view: WorkerView, base: PublicBase) -> list[Tensor]:
    """W of every layer: by the reading with the fewest secret bases that is plausible, else the base's own."""
    read = []
    for layer, (W, W_star) in enumerate(zip(base.weights, _newest(view), strict=True)):
        readings = chain([W_star], _turned_back(view, base, layer, W_star))
        read.append(next((it for it in readings if _is_plausible(it, W)), W))
    return read


def _turned_back(view: WorkerView, base: PublicBase, layer: int, W_star: Tensor) -> Iterator[Tensor]:
    """By one secret basis, then by two; each takes its time, so only when it is asked for."""
    one = align_one_sided(base.weights[layer], W_star)
    yield one.R_in @ W_star @ one.R_out.T
    two = align(view, base, layer)
    yield two.R_in @ W_star @ two.R_out.T


def _is_plausible(guess: Tensor, W: Tensor) -> bool:
    return float((guess - W).norm()) < PLAUSIBLE * float(W.norm())


def _turned(W_star: Tensor, generator: torch.Generator) -> Tensor:
    """W* (p, q) in a random basis on both sides."""
    left, right = (_random_basis(side, generator) for side in W_star.shape)
    return left @ W_star @ right


def _random_basis(p: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal matrices (p, p)."""
    Q, R = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator))
    basis: Tensor = Q * R.diagonal().sign()
    return basis


def _around(matrices: list[Tensor], how: Architecture, texts: Tensor, seed: int, steps: int) -> nn.Module:
    """A model of these matrices, with all the rest drawn and trained."""
    model = how.build(seed)
    names = set(_put(model, how.place(matrices)))
    _train(model, names, texts, steps, RATE_FROM_NOTHING, seed)
    return model


def _put(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy weights into a model; their names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return list(weights)


def _affordable(steps: int, model: nn.Module) -> int:
    parameters = sum(it.numel() for it in model.parameters())
    steps = min(steps, round(WORK / parameters))
    if steps < LEAST_STEPS:
        raise CannotRun(f"a model of {parameters:,} parameters takes too long to be trained for {LEAST_STEPS} steps")
    return steps


def _train(model: nn.Module, frozen: set[str], texts: Tensor, steps: int, rate: float, seed: int) -> None:
    """AdamW on all but the frozen parameters; the same texts in the same order for the same seed."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = texts[torch.randint(len(texts), (TEXTS,), generator=generator)]
        optimizer.zero_grad()
        _cross_entropy(model(batch), batch).mean().backward()
        optimizer.step()


def _score(guess: Thief, truth: Truth) -> Finding:
    """Errors are of the differences, text by text, for all models read the same; and of what was drawn, if any was."""
    if truth.held_out is None or truth.secret_losses is None:
        raise CannotRun("no private text was held out")
    stolen = losses(guess.stolen, truth.held_out)
    without = torch.stack([losses(model, truth.held_out) for model in guess.without])
    chance, best = float(without.mean()), float(truth.secret_losses.mean())
    if best >= chance:
        raise CannotRun("what public text alone trains is as good as the secret model: nothing is left to steal")
    error = float((stolen - without.mean(0)).std()) / math.sqrt(len(stolen))
    if len(without) > 1:
        drawn = max(float(without.mean(1).std()), SPREAD * (chance - best))
        error = math.hypot(error, drawn * math.sqrt(1 + 1 / len(without)))
    details = {"loss of the secret model": best, "steps": float(guess.steps)}
    return Finding(float(stolen.mean()), chance, best, len(stolen), error, details)
