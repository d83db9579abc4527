"""What is said of an adapter that lies on the worker: its shape, the step that it takes. Pure, as `messages`.

    y* = x* W* + s · drop(x*) A* B*       on the columns first .. first + width of W* (p, q), for each slice

Everything is in the transformed basis: A* (p, r), B* (r, width).
"""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from obfuscatune.wire.errors import LimitExceeded, MalformedMessage
from obfuscatune.wire.limits import MAX_RANK, MAX_SLICES

_SLICE = struct.Struct("<IIIdd")
_STEP = struct.Struct("<IIdddddd")
_MATRIX_ID_BYTES = 16


class Part(IntEnum):
    """A matrix that belongs to one slice of an adapter. (p, r) for those of A*, (r, width) for those of B*."""

    A = 0
    B = 1
    A_FIRST = 2
    B_FIRST = 3
    A_SECOND = 4
    B_SECOND = 5

    def number(self, index: int) -> int:
        """What names this part of the slice of that index (from 0) in a header; never zero."""
        return 1 + PARTS * index + self

    @staticmethod
    def named(number: int) -> "tuple[int, Part]":
        """The index of the slice, and which part.

        Raises:
            MalformedMessage: zero, which names none.
        """
        if number == 0:
            raise MalformedMessage("which part of the adapter is meant? 0 names none")
        index, part = divmod(number - 1, PARTS)
        return index, Part(part)


PARTS = len(Part)


@dataclass(frozen=True, slots=True)
class Slice:
    """The adapter of one layer: which columns of the matrix are that layer's, and LoRA's settings."""

    first: int
    width: int
    rank: int
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Attachment:
    """Payload of ATTACH (16 + 28 bytes for each slice): the matrix that an adapter belongs to, and its slices."""

    matrix_id: bytes
    slices: tuple[Slice, ...]

    def pack(self) -> bytes:
        """The payload as bytes."""
        parts = [_SLICE.pack(it.first, it.width, it.rank, it.scale, it.dropout) for it in self.slices]
        return self.matrix_id + b"".join(parts)

    @classmethod
    def unpack(cls, body: bytes, cols: int) -> "Attachment":
        """Read it, for a matrix of `cols` columns.

        Raises:
            MalformedMessage: another length, columns outside the matrix or in two slices, or a setting out of range.
            LimitExceeded: a rank above MAX_RANK.
        """
        rest = body[_MATRIX_ID_BYTES:]
        if not rest or len(rest) % _SLICE.size:
            raise MalformedMessage(f"ATTACH has {_SLICE.size} bytes for each slice, {len(rest)} came")
        slices = tuple(Slice(*fields) for fields in _SLICE.iter_unpack(rest))
        end = 0
        for it in slices:
            if it.first < end or it.width == 0 or it.first + it.width > cols:
                raise MalformedMessage(
                    f"a slice of columns {it.first} to {it.first + it.width}: slices follow each other within {cols}"
                )
            end = it.first + it.width
            if it.rank == 0 or not math.isfinite(it.scale) or not 0.0 <= it.dropout < 1.0:
                raise MalformedMessage(
                    f"a slice of rank {it.rank}, scale {it.scale} and dropout {it.dropout}: "
                    "expected a rank of 1 or more, a finite scale, and 0 <= dropout < 1"
                )
            if it.rank > MAX_RANK:
                raise LimitExceeded(f"a slice of rank {it.rank}: at most {MAX_RANK}")
        return cls(body[:_MATRIX_ID_BYTES], slices)


def attachment_bytes(fewest: int, most: int = MAX_SLICES) -> tuple[int, int]:
    """Bytes of an ATTACH of so many slices."""
    return _MATRIX_ID_BYTES + fewest * _SLICE.size, _MATRIX_ID_BYTES + most * _SLICE.size


class Method(IntEnum):
    """How a step follows from a gradient."""

    SGD = 1
    ADAMW = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Payload of STEP (56 bytes): one update of the factors, from the gradients times `gradient_scale`.

    `number` counts the updates, this one included; AdamW's bias correction goes by it. SGD uses neither betas nor
    `eps`.
    """

    BYTES: ClassVar[int] = _STEP.size
    method: Method
    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    gradient_scale: float

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _STEP.pack(
            self.method,
            self.number,
            self.lr,
            self.beta1,
            self.beta2,
            self.eps,
            self.weight_decay,
            self.gradient_scale,
        )

    @classmethod
    def unpack(cls, body: bytes) -> "Step":
        """Read 56 bytes.

        Raises:
            MalformedMessage: another length, an unknown method, or a setting out of range.
        """
        if len(body) != _STEP.size:
            raise MalformedMessage(f"the payload of STEP has {_STEP.size} bytes, {len(body)} came")
        method, number, *settings = _STEP.unpack(body)
        if method not in set(Method):
            raise MalformedMessage(f"STEP by method {method}: 1 to {max(Method)} exist")
        step = cls(Method(method), number, *settings)
        if not all(math.isfinite(value) and value >= 0 for value in settings) or number == 0:
            raise MalformedMessage("STEP has settings that are negative or not finite, or the number 0")
        if step.beta1 >= 1 or step.beta2 >= 1 or (step.method is Method.ADAMW and step.eps == 0):
            raise MalformedMessage("STEP needs betas below 1 and, for AdamW, an eps above 0")
        return step
