"""What really crossed: written down on the enclave's side of an audited run, to score guesses against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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
    """The secrets of one layer, in float64."""

    name: str
    W: Tensor
    """(p, q), of the secret model."""
    R_in: tuple[Tensor, ...]
    """(p, p), one for each time that the layer's transforms were drawn."""
    R_out: tuple[Tensor, ...]
    """(q, q), likewise."""


@dataclass(frozen=True)
class Truth:
    """Everything that an attacker would like to know."""

    calls: tuple[TrueCall, ...]
    """As many as the transcript has, in its order."""
    layers: tuple[TrueLayer, ...]
    bases: tuple[Tensor, ...]
    """Of each layer the public W (p, q) that the secret one was tuned from."""
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
