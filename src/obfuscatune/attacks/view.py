"""A transcript as its reader sees it: matrices, and calls that multiply by them, in order.

A run sends the model's matrices in the model's order; each forward pass then uses each once, in that order. So the
n-th forward call of L matrices is that of layer n mod L, whatever identifiers say: a re-keyed matrix is known by its
place. Layers are counted from 0, the first that crosses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from obfuscatune.attacks.base import CannotRun
from obfuscatune.wire.messages import MessageType
from obfuscatune.wire.transcript import TranscriptEntry


@dataclass(frozen=True)
class SeenMatrix:
    """W* (p, q) as it was stored, in float64; `layer` is None where it was never multiplied by."""

    W_star: Tensor
    layer: int | None


@dataclass(frozen=True)
class SeenCall:
    """One crossing: rows (m, p) that came; with `transposed`, (m, q). What went back is their product with W*."""

    index: int
    matrix: int
    """Index in `WorkerView.matrices`."""
    layer: int
    transposed: bool
    sent: Tensor
    """As they came: full-rank calls of a wide layer fill memory soon enough."""

    @property
    def rows(self) -> Tensor:
        """In float64."""
        return self.sent.double()

    @property
    def count(self) -> int:
        """m."""
        return self.sent.shape[0]

    @property
    def width(self) -> int:
        """p, or q."""
        return self.sent.shape[1]


@dataclass(frozen=True)
class WorkerView:
    """All that a worker saw in one session."""

    matrices: tuple[SeenMatrix, ...]
    calls: tuple[SeenCall, ...]
    layers: int
    """How many matrices the model has."""

    @classmethod
    def from_entries(cls, entries: Iterable[TranscriptEntry]) -> WorkerView:
        """Read a transcript of one session.

        Raises:
            CannotRun: it holds no matrix, or no product.
        """
        stored: list[Tensor] = []
        index_of: dict[bytes, int] = {}
        layer_of: dict[int, int] = {}
        calls: list[SeenCall] = []
        layers = forward = 0
        for entry in entries:
            header, tensor = entry.header, entry.tensor
            if header.type is MessageType.STORE and tensor is not None:
                index_of[header.matrix_id] = len(stored)
                stored.append(tensor.double())
            elif header.type is MessageType.MULTIPLY and tensor is not None:
                matrix = index_of[header.matrix_id]
                layers = layers or len(stored)
                if not header.transposed:
                    layer_of[matrix] = forward % layers
                    forward += 1
                layer = layer_of.get(matrix, 0)
                calls.append(SeenCall(len(calls), matrix, layer, header.transposed, tensor))
        if not stored or not calls:
            raise CannotRun("the transcript holds no matrix, or no product")
        matrices = tuple(SeenMatrix(W_star, layer_of.get(index)) for index, W_star in enumerate(stored))
        return cls(matrices, tuple(calls), layers)

    def forward(self, layer: int) -> list[SeenCall]:
        """The calls by W* of one layer, in order: one in each pass."""
        return [call for call in self.calls if call.layer == layer and not call.transposed]

    def of_newest_matrix(self, layer: int) -> list[SeenCall]:
        """Forward calls of a layer by its last W*: all under one secret basis, if others were re-keyed."""
        calls = self.forward(layer)
        return [call for call in calls if call.matrix == calls[-1].matrix]

    def backward(self, layer: int) -> list[SeenCall]:
        """The calls by its transpose."""
        return [call for call in self.calls if call.layer == layer and call.transposed]

    def products(self, call: SeenCall) -> Tensor:
        """What the worker answered, (m, q) or, transposed, (m, p)."""
        W_star = self.matrices[call.matrix].W_star
        return call.rows @ (W_star.T if call.transposed else W_star)

    @cached_property
    def trained_passes(self) -> frozenset[int]:
        """Which forward passes were followed by gradients before the next."""
        trained, number = set(), -1
        for call in self.calls:
            number += call.layer == 0 and not call.transposed
            if call.transposed:
                trained.add(number)
        return frozenset(trained)

    def decoding(self, layer: int) -> list[SeenCall]:
        """Forward calls of generation that carry one token each: the shortest, and many of one length."""
        forward = self.forward(layer)
        calls = [call for number, call in enumerate(forward) if number not in self.trained_passes]
        if not calls:
            raise CannotRun("nothing was generated")
        fewest = min(call.count for call in calls)
        return [call for call in calls if call.count == fewest]

    def training(self, layer: int) -> list[SeenCall]:
        """Forward calls of training."""
        calls = [call for number, call in enumerate(self.forward(layer)) if number in self.trained_passes]
        if not calls:
            raise CannotRun("nothing was trained")
        return calls

    def prompts(self, layer: int) -> list[SeenCall]:
        """Forward calls of generation that carry a whole prompt; all of generation where lengths do not tell."""
        decoding = {call.index for call in self.decoding(layer)}
        forward = enumerate(self.forward(layer))
        calls = [call for number, call in forward if number not in self.trained_passes and call.index not in decoding]
        return calls or self.decoding(layer)
