"""What really crossed, and measures that hold guesses against it, each with its chance level and standard error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from obfuscatune.audit.attacks.base import CannotRun, Finding, Recovered

Phase = Literal["training", "prompt", "decoding"]


@dataclass(frozen=True)
class TrueCall:
    """The plain rows of one crossing, in the order of the transcript."""

    layer: int
    transposed: bool
    rows: Tensor
    """x (n, p) or, transposed, g (n, q); float64."""
    tokens: tuple[int, ...]
    """The token at each row's place."""
    phase: Phase
    text: int
    """Which training example or prompt, counted within its phase."""
    epoch: int
    """Which of the layer's transforms were in use: 0 until it is re-keyed."""


@dataclass(frozen=True)
class TrueLayer:
    """The secret bases of one layer, in float64."""

    name: str
    R_in: Sequence[Tensor]
    """(p, p), one for each time that the layer's transforms were drawn."""
    R_out: Sequence[Tensor]
    """(q, q), likewise."""


@dataclass(frozen=True)
class Truth:
    """Everything that an attacker would like to know."""

    calls: tuple[TrueCall, ...]
    """As many as the transcript has, in its order."""
    layers: tuple[TrueLayer, ...]
    weights: Sequence[Tensor]
    """W (p, q) of each layer, float64."""
    bases: Sequence[Tensor]
    """The public ones that these were tuned from."""
    pieces: tuple[str, ...]
    """What each token reads, by its number."""
    adapters: tuple[Tensor, ...] = ()
    """What fine-tuning added to each layer's W in the end, (p, q); empty where no adapter was on the worker."""
    held_out: Tensor | None = None
    """Private text that the secret model was not trained on, (n, length)."""
    secret_losses: Tensor | None = None
    """The secret model's mean next-token loss on each, (n,)."""

    def rotated(self, call: TrueCall) -> Tensor:
        """x R_in of a forward call, (n, p): its rows as the worker would see them unmixed."""
        return call.rows @ self.layers[call.layer].R_in[call.epoch]

    def text_of(self, tokens: list[int] | tuple[int, ...]) -> str:
        """Tokens as text, as far as single tokens tell."""
        return "".join(self.pieces[token] for token in tokens)


SHOWN_TEXTS = 4
SHOWN_TOKENS = 48


@dataclass(frozen=True)
class TokenGuess:
    """A token for each row, by the index of the call; `order` ties calls of one text together for reading."""

    tokens: Mapping[int, tuple[int, ...]]


def area_under_curve(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """AUC of `scores` (n,) for the pairs marked in `positive` (n,), ties counted half, and its standard error.

    Chance is 0.5. Error after Hanley & McNeil 1982, as if pairs were independent.

    Raises:
        CannotRun: all pairs are of one kind.
    """
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no:
        raise CannotRun("nothing to tell apart: all pairs are alike, or none")
    _, rank_group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[rank_group]
    area = float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))
    above, below = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (yes - 1) * (above - area * area) + (no - 1) * (below - area * area)
    return area, max(math.sqrt(max(variance, 0.0) / (yes * no)), 0.5 / yes)


def score_pairs(scores: Tensor, positive: Tensor, details: Mapping[str, float] | None = None) -> Finding:
    """A finding in AUC."""
    area, error = area_under_curve(scores, positive)
    counted = {"pairs": float(positive.numel()), "alike": float(positive.sum())}
    return Finding(area, 0.5, 1.0, positive.numel(), error, {**counted, **(details or {})})


def score_tokens(guess: TokenGuess, truth: Truth, ahead: int = 0) -> Finding:
    """Share of rows whose token, or the one so far `ahead` of it, is named.

    Chance is that of the same guesses dealt to the rows at random: what knowing which tokens are common is worth.
    """
    pairs: list[tuple[int, int]] = []
    by_text: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for index, guessed in guess.tokens.items():
        call = truth.calls[index]
        rows = list(zip(call.tokens[ahead:], guessed, strict=False))
        pairs += rows
        phase = "training" if call.phase == "training" else "generation"
        by_text.setdefault((phase, call.text), []).extend(rows)
    if not pairs:
        raise CannotRun("no row was given a token")
    total = len(pairs)
    true, guessed_counts = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(count * guessed_counts[token] for token, count in true.items()) / total**2
    value = sum(a == b for a, b in pairs) / total
    error = math.sqrt(max(value * (1 - value), chance * (1 - chance), 1 / total) / total)
    shown = [rows[:SHOWN_TOKENS] for rows in list(by_text.values())[:SHOWN_TEXTS]]
    recovered = tuple(
        Recovered(truth.text_of([a for a, _ in rows]), truth.text_of([b for _, b in rows])) for rows in shown
    )
    return Finding(value, chance, 1.0, total, error, recovered=recovered)


def pairs_of(count: int) -> tuple[Tensor, Tensor]:
    """Indices i < j of all pairs."""
    i, j = torch.triu_indices(count, count, 1)
    return i, j


def same(labels: Sequence[object]) -> Tensor:
    """For all pairs i < j: whether labels[i] == labels[j]."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    codes = torch.tensor([numbers[label] for label in labels])
    i, j = pairs_of(len(labels))
    return codes[i] == codes[j]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one shape, as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))
