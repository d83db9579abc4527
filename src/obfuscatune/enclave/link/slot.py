"""A slot: few rows are handed to a worker that watches it, without a message for each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Self

import torch

from obfuscatune.enclave import kernels
from obfuscatune.enclave.link.arena import Arena
from obfuscatune.enclave.link.connection import LinkConnection, Refused
from obfuscatune.enclave.link.pending import Pending
from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import MalformedMessage
from obfuscatune.wire.limits import MAX_SLOT_ROWS, MAX_WATCHED
from obfuscatune.wire.messages import MessageType
from obfuscatune.wire.slot import SLOT_BYTES, Watched, Word

if TYPE_CHECKING:
    from obfuscatune.enclave.kernels.slot import SlotKernels

LOOK_SECONDS = 500e-6
"""How long an answer is waited for before we look whether the worker has something else to say."""
REST_SECONDS = 1.0
"""After a worker would not watch, messages are sent for so long before it is asked again."""


class State(IntEnum):
    """What a wait for an answer found."""

    PENDING = 0  # nothing yet
    ANSWERED = 1
    UNWATCHED = 2  # nothing, and nobody watches: the worker may not have seen the request


def fits(pending: Pending) -> bool:
    """Whether a request may be handed over in a slot."""
    return (
        type(pending) is Pending
        and pending.rows.shape[0] <= MAX_SLOT_ROWS
        and not pending.transpose
        and pending.rows.dtype == pending.dtype == torch.float32
    )


class WatchedSlot:
    """Takes one request at a time. What the worker writes into it is believed only as to when it is done."""

    def __init__(self, slot: torch.Tensor, offset: int, compiled: SlotKernels) -> None:
        """A slot (16 words) at that offset of the shared memory, all zero."""
        self._slot, self._offset = slot, offset
        self._kernels = compiled
        self._turns = max(int(LOOK_SECONDS * compiled.turns_per_second), 1)
        self._number = 0
        self._rests_until = 0.0
        self._called_away = False
        self._places: dict[bytes, int] = {}
        self.watch_id: int | None = None
        """Of the WATCH that is not answered yet; None where there is none."""

    @classmethod
    def lent_by(cls, arena: Arena) -> Self | None:
        """A slot in that memory, for as long as the connection lasts; None where there can be none."""
        with torch.inference_mode(False):  # who asks first may be in inference mode, who asks next need not
            lent = arena.lend(1, SLOT_BYTES, torch.uint8) if kernels.are_there() else None
            offset = None if lent is None else arena.offset_of(lent)
            if lent is None or offset is None:
                return None
            from obfuscatune.enclave.kernels.slot import compiled

            return cls(lent.zero_().view(torch.int64)[0], offset, compiled())

    @property
    def rests(self) -> bool:
        """Whether messages are to be sent for the time being."""
        return time.monotonic() < self._rests_until

    @property
    def is_used(self) -> bool:
        """Whether the worker watches, or did the last time it was asked to."""
        return bool(self._places) and not self.rests

    def is_watched_for(self, matrix_id: bytes) -> bool:
        """Whether a WATCH that names that matrix is not answered yet, nor is the worker called away."""
        return self.watch_id is not None and not self._called_away and matrix_id in self._places

    def begin_watch(self, request_id: int, matrix_ids: Iterable[bytes], wanted: bytes) -> Watched:
        """What WATCH is to say: all these matrices, or as many as may be, the one that is wanted among them."""
        ids = tuple(matrix_ids)[-MAX_WATCHED:]
        if wanted not in ids:
            ids = (*ids[1:], wanted)
        self._places = {matrix_id: place for place, matrix_id in enumerate(ids)}
        self.watch_id = request_id
        return Watched(self._offset, ids)

    def call_away(self) -> None:
        """Have the worker leave."""
        self._called_away = True
        self._slot[Word.LEAVE] = 1

    def leave(self, connection: LinkConnection, deadline: Deadline) -> None:
        """Call the worker away and wait until it has left, so that it reads messages again.

        Raises:
            ProtocolError: it says that we broke the protocol, or something that answers no WATCH.
        """
        self.call_away()
        reply = connection.receive(deadline)
        refused = reply.type is MessageType.ERROR
        if refused and reply.request_id in (0, self.watch_id):
            error = connection.refusal(reply, deadline)
            if reply.request_id == 0 or not isinstance(error, Refused):
                raise error
        elif reply.type is not MessageType.DONE or reply.request_id != self.watch_id:
            raise MalformedMessage(f"{reply.type.name} came, which does not answer WATCH")
        self.end_watch(refused=refused)

    def end_watch(self, *, refused: bool) -> None:
        """The worker watches no longer, or would not: then messages are sent for a while."""
        self.watch_id = None
        self._called_away = False
        self._slot[Word.LEAVE] = 0
        if refused:
            self._rests_until = time.monotonic() + REST_SECONDS

    def post(self, pending: Pending, rows_offset: int, product_offset: int) -> None:
        """Hand over a request for a matrix that is watched for."""
        self._number += 1
        place = self._places[pending.matrix_id]
        self._kernels.post(
            self._slot.data_ptr(), self._number, place, pending.rows.shape[0], rows_offset, product_offset
        )

    def wait(self) -> State:
        """For the answer to what was posted last, awake, for a moment."""
        return self._kernels.wait(self._slot.data_ptr(), self._number, self._turns)
