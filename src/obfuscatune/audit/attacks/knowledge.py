"""What an attacker holds besides the transcript."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.audit.attacks.base import Attacker, CannotRun


@dataclass(frozen=True)
class Scheme:
    """The public settings of the profile; no secret among them."""

    mixing: bool
    shield_rows: int


@dataclass(frozen=True)
class PublicText:
    """Text of the same kind as the private one, as token numbers."""

    texts: tuple[tuple[int, ...], ...]
    vocabulary: int


@dataclass(frozen=True)
class PublicBase:
    """The published model, run on public text.

    Attributes:
        weights: of each layer that crosses, the public W (p, q), float64.
        inputs: the rows (N, p) that public text brings to the first of these layers, float64.
        covariances: of these layers, by number, xᵀ x (p, p) of the rows x that public text brings to it, of trace 1;
            of a large model the first and the last ones'.
        tokens: the token at each of the N places.
        head: (V, width), what the model's last hidden state is multiplied with for each token's logit, the scale of
            the last norm included.
        first_rows: runs token numbers (n, length): the rows (n, length, p) that they bring to the first layer, float64.
    """

    weights: Sequence[Tensor]
    inputs: Tensor
    covariances: Mapping[int, Tensor]
    tokens: Tensor
    head: Tensor
    first_rows: Callable[[Tensor], Tensor]

    def typical_rows(self) -> tuple[Tensor, Tensor]:
        """Tokens (T,) of the public text, and each one's mean row (T, p) at the first layer."""
        tokens, index, counts = torch.unique(self.tokens, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(tokens), self.inputs.shape[1], dtype=torch.float64)
        sums.index_add_(0, index, self.inputs)
        return tokens, sums / counts[:, None]


@dataclass(frozen=True)
class Architecture:
    """How the model is built: as public as the algorithm.

    Attributes:
        build: a module of random weights, from a seed; it takes token numbers (n, length) to logits (n, length, V).
        published: the same with the weights of the public base.
        place: from a W (p, q) for each layer that crosses to the module's parameters, by name.
        trained: kept by who trains such modules, for whom it takes minutes; by whatever tells them apart.
    """

    build: Callable[[int], nn.Module]
    published: Callable[[], nn.Module]
    place: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    trained: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, train: Callable[[], nn.Module]) -> nn.Module:
        """What was trained under that key before, or is now."""
        if key not in self.trained:
            self.trained[key] = train()
        model: nn.Module = self.trained[key]
        return model


@dataclass(frozen=True)
class KnownCall:
    """The plain rows x (n, p) of the call with that index."""

    index: int
    rows: Tensor


@dataclass(frozen=True)
class Knowledge:
    """Everything an attacker has; what `attacker` has not is None or empty."""

    attacker: Attacker
    scheme: Scheme
    text: PublicText | None = None
    architecture: Architecture | None = None
    base: PublicBase | None = None
    plaintext: tuple[KnownCall, ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()
    """Texts that the attacker holds, as token numbers; some of them are among the private ones."""

    def the_text(self) -> PublicText:
        """Public text.

        Raises:
            CannotRun: the attacker has none.
        """
        if self.text is None:
            raise CannotRun("needs public text")
        return self.text

    def the_architecture(self) -> Architecture:
        """How the model is built.

        Raises:
            CannotRun: there is no model to build.
        """
        if self.architecture is None:
            raise CannotRun("needs to know how the model is built")
        return self.architecture

    def the_base(self) -> PublicBase:
        """The public base.

        Raises:
            CannotRun: the attacker has none.
        """
        if self.base is None:
            raise CannotRun("needs the public base model")
        return self.base
