"""A slot: 128 bytes of shared memory in which requests for few rows are handed over without a message for each.

The enclave writes what it asks, then the number of the request; the worker, which watches that number, reads the
request once, lays the product where it is wanted, then writes the number as answered. Both write words of 8 bytes,
each side in a line of the cache of its own. docs/spec/wire.md has the rules.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from obfuscatune.wire.errors import MalformedMessage

SLOT_BYTES = 128
MATRIX_ID_BYTES = 16
_PLACE = struct.Struct("<Q")


class Word(IntEnum):
    """Where each word of a slot stands; times 8 is its offset in bytes."""

    POSTED = 0  # the enclave's: number of its last request
    MATRIX = 1  # by its place in WATCH, from 0
    ROWS = 2
    FROM = 3  # offset of the rows in the shared memory
    TO = 4  # offset of the product
    LEAVE = 5  # not 0: the worker is to watch no longer
    ANSWERED = 8  # the worker's: number of the last request that it answered
    WATCHED = 9  # 1 while it watches


def watch_bytes(least: int, most: int) -> tuple[int, int]:
    """Sizes of WATCH's payload with so many matrices."""
    return _PLACE.size + MATRIX_ID_BYTES * least, _PLACE.size + MATRIX_ID_BYTES * most


@dataclass(frozen=True, slots=True)
class Watched:
    """Payload of WATCH: where the slot lies, and which matrices its requests are about."""

    slot: int
    matrix_ids: tuple[bytes, ...]

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _PLACE.pack(self.slot) + b"".join(self.matrix_ids)

    @classmethod
    def unpack(cls, body: bytes) -> "Watched":
        """Read it; that the slot lies within the memory is for whoever has it to check.

        Raises:
            MalformedMessage: its end is no whole id.
        """
        ids = body[_PLACE.size :]
        if len(body) < _PLACE.size or len(ids) % MATRIX_ID_BYTES:
            raise MalformedMessage(f"{len(body)} bytes are no place of a slot with ids of {MATRIX_ID_BYTES} bytes")
        starts = range(0, len(ids), MATRIX_ID_BYTES)
        (slot,) = _PLACE.unpack(body[: _PLACE.size])
        return cls(slot, tuple(ids[at : at + MATRIX_ID_BYTES] for at in starts))
