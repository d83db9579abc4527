"""A transcript as its reader sees it: matrices, and calls that multiply by them, in order.

A run sends the model's matrices in the model's order; each forward pass then uses each once, in that order. So a
matrix that was not seen in use before is that of the layer after the one before it: a re-keyed one is known by its
place. Layers are counted from 0, the first that crosses. Rows for an adapter on the worker are calls of the layer whose
matrix it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from obfuscatune.audit.attacks.base import CannotRun
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.payloads import Attachment, Part, Slice, Step
from obfuscatune.protocol.transcript import TranscriptEntry


@dataclass(frozen=True)
class SeenMatrix:
    """W* (p, q); `layer` is None where it was never multiplied by."""

    stored: Tensor
    """As it came, perhaps still on the disk."""
    layer: int | None

    @property
    def W_star(self) -> Tensor:  # noqa: N802 - as in the formulas
        """In float64."""
        return self.stored.double()


@dataclass(frozen=True)
class SeenCall:
    """One crossing: rows (m, p) that came; with `transposed`, (m, q).

    What went back is their product with W*, and an adapter's part, where it lies on the worker.
    """

    index: int
    matrix: int
    """Index in `WorkerView.matrices`."""
    layer: int
    transposed: bool
    sent: Tensor
    """As they came, perhaps still on the disk: full-rank calls of a wide layer fill memory soon enough."""
    awaited_ns: int = 0
    """How long the worker had nothing to do before it: what the enclave took since the last reply."""
    number: int = 0
    """Of the forward pass, where an adapter keeps something for its way back; 0 elsewhere."""
    mask: Tensor | None = None
    """r (m, p), for who knows what the rows are hidden under: two workers that collude."""

    @property
    def rows(self) -> Tensor:
        """In float64, with the mask taken away where it is known: exact, for both are integers of one grid."""
        return self.sent.double() if self.mask is None else self.sent.double() - self.mask

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
    adapters: tuple[HeldAdapter, ...] = ()
    """Those on the worker, each as it was attached last."""
    steps: tuple[HeldStep, ...] = ()
    """Updates of all of them."""

    @classmethod
    def from_entries(cls, entries: Iterable[TranscriptEntry]) -> WorkerView:
        """Read a transcript of one session.

        Raises:
            CannotRun: it holds no matrix, or no product.
        """
        reader = _Reader()
        for entry in entries:
            reader.read(entry)
        return reader.view()

    def forward(self, layer: int) -> list[SeenCall]:
        """The calls by W* of one layer, in order: one in each pass."""
        return self._by_layer.get((layer, False), [])

    def of_newest_matrix(self, layer: int) -> list[SeenCall]:
        """Forward calls of a layer by its last W*: all under one secret basis, if others were re-keyed."""
        calls = self.forward(layer)
        return [call for call in calls if call.matrix == calls[-1].matrix]

    def backward(self, layer: int) -> list[SeenCall]:
        """The calls by its transpose."""
        return self._by_layer.get((layer, True), [])

    @cached_property
    def _by_layer(self) -> dict[tuple[int, bool], list[SeenCall]]:
        found: dict[tuple[int, bool], list[SeenCall]] = {}
        for call in self.calls:
            found.setdefault((call.layer, call.transposed), []).append(call)
        return found

    def products(self, call: SeenCall) -> Tensor:
        """The product of the rows with W*, (m, q) or, transposed, (m, p): what the worker answered with.

        Where the mask is known it is X* W*, as Y' - r W* is up to rounding.
        """
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


class _Reader:
    """Puts the view together, message by message."""

    def __init__(self) -> None:
        self._stored: list[Tensor] = []
        self._index_of: dict[bytes, int] = {}
        self._layer_of: dict[int, int] = {}
        self._calls: list[SeenCall] = []
        self._layers = self._replied_ns = 0
        self._last = -1
        self._adapters = HoldsAdapters()

    def read(self, entry: TranscriptEntry) -> None:
        header, tensor = entry.header, entry.tensor
        match header.type:
            case MessageType.STORE if tensor is not None:
                self._index_of[header.matrix_id] = len(self._stored)
                self._stored.append(tensor)
            case MessageType.MULTIPLY if tensor is not None:
                self._call(entry, tensor, self._index_of[header.matrix_id], header.transposed)
            case MessageType.FORWARD | MessageType.BACKWARD if tensor is not None:
                matrix = self._index_of[self._adapters.matrix_of(header.matrix_id)]
                self._call(entry, tensor, matrix, header.type is MessageType.BACKWARD)
            case _:
                self._adapters.read(entry, len(self._calls))
        if entry.direction == "reply":
            self._replied_ns = entry.at_ns

    def _call(self, entry: TranscriptEntry, rows: Tensor, matrix: int, transposed: bool) -> None:
        self._layers = self._layers or len(self._stored)
        if not transposed:
            self._last = self._layer_of.setdefault(matrix, (self._last + 1) % self._layers)
        layer = self._layer_of.get(matrix, 0)
        awaited = max(0, entry.at_ns - self._replied_ns)
        self._calls.append(SeenCall(len(self._calls), matrix, layer, transposed, rows, awaited, entry.header.code))

    def view(self) -> WorkerView:
        if not self._stored or not self._calls:
            raise CannotRun("the transcript holds no matrix, or no product")
        matrices = tuple(SeenMatrix(stored, self._layer_of.get(index)) for index, stored in enumerate(self._stored))
        adapters = self._adapters.adapters(lambda matrix_id: self._layer_of.get(self._index_of[matrix_id]))
        return WorkerView(matrices, tuple(self._calls), self._layers, adapters, self._adapters.steps())


Factors = dict[tuple[int, Part], Tensor]
"""By slice and part, in float64."""


@dataclass(frozen=True)
class HeldAdapter:
    """One adapter: y* = x* W* + s x* A* B* on the columns of each slice."""

    layer: int
    since: int
    """How many calls there were before it was attached."""
    slices: tuple[Slice, ...]
    put: Factors
    """A* (p, r) and B* (r, width) as they came, and AdamW's moments, if any did."""
    fetched: Factors
    """As they were fetched last: a worker has them all the time, a transcript only of what crossed."""

    def delta(self, q: int) -> Tensor | None:
        """s A* B* of all slices side by side, (p, q), from what was fetched; None where something is missing."""
        if any((index, part) not in self.fetched for index in range(len(self.slices)) for part in (Part.A, Part.B)):
            return None
        p = self.fetched[0, Part.A].shape[0]
        delta = self.fetched[0, Part.A].new_zeros(p, q)
        for index, it in enumerate(self.slices):
            change = it.scale * self.fetched[index, Part.A] @ self.fetched[index, Part.B]
            delta[:, it.first : it.first + it.width] = change
        return delta


@dataclass(frozen=True)
class HeldStep:
    """One update of all adapters, after that many calls."""

    after: int
    settings: Step


@dataclass
class _Attached:
    attachment: Attachment
    since: int
    put: Factors
    fetched: Factors


class HoldsAdapters:
    """Follows the messages about adapters."""

    def __init__(self) -> None:
        self._attached: dict[bytes, _Attached] = {}
        self._steps: list[HeldStep] = []
        self._asked: dict[int, tuple[bytes, int]] = {}

    def matrix_of(self, adapter_id: bytes) -> bytes:
        """The matrix that an adapter belongs to."""
        return self._attached[adapter_id].attachment.matrix_id

    def read(self, entry: TranscriptEntry, calls: int) -> None:
        """Take in one message that is no call; `calls`: how many there were before."""
        header, tensor = entry.header, entry.tensor
        match header.type:
            case MessageType.ATTACH:
                attachment = Attachment.unpack(entry.body, header.cols)
                self._attached[header.matrix_id] = _Attached(attachment, calls, {}, {})
            case MessageType.PUT if tensor is not None:
                self._attached[header.matrix_id].put[Part.named(header.code)] = tensor.double()
            case MessageType.FETCH:
                self._asked[header.request_id] = header.matrix_id, header.code
            case MessageType.PRODUCT if tensor is not None and header.request_id in self._asked:
                adapter_id, number = self._asked.pop(header.request_id)
                self._attached[adapter_id].fetched[Part.named(number)] = tensor.double()
            case MessageType.STEP:
                self._steps.append(HeldStep(calls, Step.unpack(entry.body)))
            case _:
                pass

    def adapters(self, layer_of: Callable[[bytes], int | None]) -> tuple[HeldAdapter, ...]:
        """Of each layer the one that was attached last, by layer."""
        newest: dict[int, HeldAdapter] = {}
        for it in self._attached.values():
            layer = layer_of(it.attachment.matrix_id)
            if layer is not None:
                newest[layer] = HeldAdapter(layer, it.since, it.attachment.slices, it.put, it.fetched)
        return tuple(newest[layer] for layer in sorted(newest))

    def steps(self) -> tuple[HeldStep, ...]:
        """In order."""
        return tuple(self._steps)
