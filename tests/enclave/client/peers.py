"""A worker in memory, on the interface that sockets implement; it may do what no honest worker would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from obfuscatune.backend import Computer
from obfuscatune.errors import ConnectionLost, DeadlineExceeded
from obfuscatune.protocol.messages import HEADER_BYTES, REQUESTS, WITH_ROWS, Header, MessageType
from obfuscatune.protocol.payloads import Hello
from obfuscatune.protocol.transport import Buffer, Deadline
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.connection import welcome
from obfuscatune.worker.handlers import Answerer, Request
from obfuscatune.worker.quota import Quota
from obfuscatune.worker.sessions import session_key
from obfuscatune.worker.store import MatrixStore

Mischief = Callable[[bytes], bytes | None]
"""What is sent instead of a reply. None: nothing, ever again on this connection."""


class MemoryWorker:
    """What a worker holds. Call it for a connection, as `WorkerClient` does."""

    def __init__(self, *, quota_bytes: int = 2**20, mischief: Mischief | None = None, times: int = 10**9) -> None:
        """`mischief` befalls the first `times` products."""
        self.store = MatrixStore(Quota(quota_bytes))
        self.answerer = Answerer(self.store, Computer(torch.device("cpu")))
        self.mischief = mischief
        self.times = times
        self.connections: list[MemoryTransport] = []
        self.seen: list[Header] = []
        self.handshake: Mischief | None = None
        self.last_words = b""
        """The last product that was sent as it should be."""

    def __call__(self) -> MemoryTransport:
        self.connections.append(MemoryTransport(self))
        return self.connections[-1]


class MemoryTransport:
    """One connection: requests are answered as soon as they are whole; replies wait in a buffer."""

    def __init__(self, worker: MemoryWorker) -> None:
        self._worker = worker
        self._session = session_key("peer", b"")
        self._received = bytearray()
        self._replies = bytearray()
        self._mute = False
        self.ended = False
        """The peer's end: no more bytes will come."""
        self.closed = False

    shares_memory = False
    is_local = False

    def has_news(self, seconds: float = 0.0) -> bool:
        """Whoever asks reads: a reply is there, or the end."""
        return True

    def take_descriptor(self) -> int | None:
        return None

    def send(self, buffers: Sequence[Buffer], deadline: Deadline, descriptor: int | None = None) -> None:
        self._check_open()
        for buffer in buffers:
            self._received += buffer
        while (request := self._next_request()) is not None:
            self._answer(request)

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        self._check_open()
        if not self._replies:
            if self.ended:
                return 0
            raise DeadlineExceeded("no answer, nor a thread here that could send one: the time can only run out")
        came = min(len(view), len(self._replies))
        view[:came] = self._replies[:came]
        del self._replies[:came]
        return came

    def stop_sending(self) -> None:
        self._mute = True

    def shutdown(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionLost("used after it was closed")

    def _next_request(self) -> Request | None:
        if len(self._received) < HEADER_BYTES:
            return None
        header = Header.unpack(self._received, expected=REQUESTS)
        size = HEADER_BYTES + header.payload_bytes
        if len(self._received) < size:
            return None
        payload = bytes(self._received[HEADER_BYTES:size])
        del self._received[:size]
        if header.type in {MessageType.STORE, *WITH_ROWS}:
            flat = torch.frombuffer(bytearray(payload), dtype=header.dtype.torch_dtype)
            return Request(header, tensor=flat.view(header.rows, header.cols))
        return Request(header, payload)

    def _answer(self, request: Request) -> None:
        worker = self._worker
        worker.seen.append(request.header)
        if request.header.type is MessageType.HELLO:
            self._session = session_key("peer", Hello.unpack(request.body).session_id)
            reply = welcome(worker.store.quota.total, worker.answerer.features)
            self._say(reply.header.pack() + bytes(reply.payload), worker.handshake)
            return
        if request.header.type is MessageType.STORE:
            claim = worker.store.reserve(self._session, request.header.payload_bytes)
            request = replace(request, claim=claim)
        reply = worker.answerer.answer(self._session, request, Buffers())
        data = reply.header.pack() + bytes(reply.payload)
        mischief = None
        if reply.header.type is MessageType.PRODUCT and worker.times > 0:
            mischief = worker.mischief
            worker.times -= mischief is not None
        if mischief is None and reply.header.type is MessageType.PRODUCT:
            worker.last_words = data
        self._say(data, mischief)

    def _say(self, data: bytes, mischief: Mischief | None) -> None:
        if self._mute or self.ended:
            return
        said = data if mischief is None else mischief(data)
        if said is None:
            self._mute = True
            return
        self._replies += said
        if len(said) < len(data) and data.startswith(said):
            self.ended = True  # it hung up in the middle
