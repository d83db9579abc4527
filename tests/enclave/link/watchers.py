"""A worker in memory that shares memory as well, and watches a slot: as it should, or in any other way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.messages import HEADER_BYTES, REQUESTS, WITH_ROWS, Header, MessageType
from obfuscatune.wire.payloads import SHARED_MEMORY, SLOTS, Places, unpack_number
from obfuscatune.wire.shared_memory import SharedMemory
from obfuscatune.wire.slot import SLOT_BYTES, Watched, Word
from obfuscatune.wire.transport import Buffer
from obfuscatune.worker.answer import Answerer, Request
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.greeting import welcome
from tests.enclave.link.peers import MemoryTransport, MemoryWorker

Watching = Callable[["WatchingTransport", Request], bytes | None]
"""What is done at a WATCH, and said then. None: nothing, ever again on this connection."""


class WatchingWorker(MemoryWorker):
    """Call it for a connection, as `WorkerLink` does."""

    def __init__(self, watching: Watching | None = None, times: int = 10**9) -> None:
        """The first `times` WATCHes are answered by `watching`, the others as they should be."""
        super().__init__()
        self.watching = watching
        self.watches = times
        self.posted: list[int] = []
        """Number of the request that was in the slot when each WATCH came."""

    def __call__(self) -> WatchingTransport:
        self.connections.append(WatchingTransport(self))
        return self.connections[-1]  # type: ignore[return-value]


class WatchingTransport(MemoryTransport):
    """All happens while the enclave sends: what it posts after WATCH, nobody sees."""

    shares_memory = True
    memory: SharedMemory
    words: torch.Tensor
    """Of the slot, since the first WATCH."""

    def __init__(self, worker: WatchingWorker) -> None:
        super().__init__(worker)
        self.worker = worker
        self._descriptor: int | None = None

    @property
    def answerer(self) -> Answerer:
        return self.worker.answerer

    def send(self, buffers: Sequence[Buffer], deadline: Deadline, descriptor: int | None = None) -> None:
        if descriptor is not None:
            self._descriptor = os.dup(descriptor)
        super().send(buffers, deadline)

    def has_news(self) -> bool:
        return bool(self._replies) or self.ended

    def _next_request(self) -> Request | None:
        """Rows and matrices in shared memory, too."""
        if len(self._received) < HEADER_BYTES:
            return None
        header = Header.unpack(self._received, expected=REQUESTS)
        size = HEADER_BYTES + header.payload_bytes
        if not header.shared or len(self._received) < size:
            return super()._next_request()
        payload = bytes(self._received[HEADER_BYTES:size])
        del self._received[:size]
        shape = header.rows, header.cols, header.dtype.torch_dtype
        if header.type in WITH_ROWS:
            places = Places.unpack(payload)
            rows = self.memory.matrix(places.rows, *shape)
            return Request(header, tensor=rows, landing=self.memory.rest(places.product))
        return Request(header, tensor=self.memory.matrix(unpack_number(payload), *shape).clone())

    def _answer(self, request: Request) -> None:
        worker, header = self.worker, request.header
        if header.type is MessageType.HELLO:
            super()._answer(request)
            features = worker.answerer.features | SHARED_MEMORY | SLOTS
            reply = welcome(worker.store.quota.total, features)
            self._replies[:] = reply.header.pack() + bytes(reply.payload)
        elif header.type is MessageType.STORE:
            worker.seen.append(header)
            claim = worker.store.reserve(self._session, header.matrix_bytes)
            self._reply(replace(request, claim=claim))
        elif header.type is MessageType.WATCH:
            worker.seen.append(header)
            self._watch(Request(header, request.body, memory=self.memory))
        else:
            if header.type is MessageType.SHARE:
                self.memory = SharedMemory.attach(self._descriptor, unpack_number(request.body))
            super()._answer(request)

    def _watch(self, request: Request) -> None:
        worker = self.worker
        slot = Watched.unpack(request.body).slot
        self.words = self.memory.matrix(slot, 1, SLOT_BYTES, torch.uint8).view(torch.int64)[0]
        worker.posted.append(int(self.words[Word.POSTED]))
        if worker.watching is None or worker.watches <= 0:
            self._reply(request)
            return
        worker.watches -= 1
        self._say(b"", lambda _: worker.watching and worker.watching(self, request))

    def _reply(self, request: Request) -> None:
        reply = self.answerer.answer(self._session, request, Buffers())
        self._say(reply.header.pack() + bytes(reply.payload), None)
