"""What a worker holds of adapters: factors as they were put and fetched, and the updates between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from obfuscatune.wire.adapters import Attachment, Part, Slice, Step
from obfuscatune.wire.messages import MessageType
from obfuscatune.wire.transcript import TranscriptEntry

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
