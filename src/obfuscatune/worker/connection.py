"""One connection of an enclave: HELLO and WELCOME, then its thread reads a request, answers it, and reads the next.

A second thread answers, in order, what would keep the first from reading: large requests, whose successors are read
meanwhile, and replies that the socket does not take at once. It is started when it is first needed. So the reader
never waits for a reply to be taken, which is what a client relies on: with no more requests outstanding than WELCOME
allows, it may send all of them before it reads a reply, and neither side waits for the other for ever.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from obfuscatune.errors import LimitExceeded, ProtocolError, StorageError, UnsupportedVersion, WireError, WorkerRefused
from obfuscatune.protocol.framing import recv_body, recv_header, send_message
from obfuscatune.protocol.limits import (
    CHUNK_BYTES,
    HANDSHAKE_SECONDS,
    KIB,
    LINGER_SECONDS,
    MAX_IN_FLIGHT,
    MAX_MATRIX_BYTES,
    MAX_WINDOW_BYTES,
    STALL_SECONDS,
    VERSION,
)
from obfuscatune.protocol.messages import ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import SHARED_MEMORY, Hello, Welcome
from obfuscatune.protocol.recorder import Recorder
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.transcript import Direction
from obfuscatune.protocol.transport import Buffer, Deadline, Transport, transfer_seconds
from obfuscatune.worker.buffers import Buffers
from obfuscatune.worker.handlers import Answerer
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.replies import Reply, Request, refusal
from obfuscatune.worker.request_reader import RequestReader
from obfuscatune.worker.sessions import Session, Sessions, session_key, session_label

HELLO = frozenset({MessageType.HELLO})


def read_hello(transport: Transport, peer: str, deadline: Deadline) -> SessionKey:
    """Read HELLO of that peer; the key of the session that it opens or goes on with.

    Raises:
        UnsupportedVersion: no version that both sides speak.
        WireError: anything else but a HELLO came, or nothing.
    """
    header = recv_header(transport, HELLO, deadline=deadline)
    hello = Hello.unpack(recv_body(transport, header, deadline))
    if not hello.oldest <= VERSION <= hello.newest:
        raise UnsupportedVersion(f"versions {hello.oldest} to {hello.newest} offered, {VERSION} spoken here")
    return session_key(peer, hello.session_id)


def welcome(quota_bytes: int, features: int) -> Reply:
    """What this worker takes."""
    largest = min(MAX_MATRIX_BYTES, quota_bytes)
    body = Welcome(VERSION, MAX_IN_FLIGHT, features, MAX_WINDOW_BYTES, largest, quota_bytes).pack()
    return Reply(Header(MessageType.WELCOME, payload_bytes=len(body)), body)


def farewell(error: WireError) -> Reply | None:
    """What to say before hanging up because of `error`; None where nobody is left to hear it."""
    if isinstance(error, UnsupportedVersion):
        return refusal(ErrorCode.VERSION, str(error), last=True)
    if isinstance(error, LimitExceeded):
        return refusal(ErrorCode.LIMIT, str(error), last=True)
    if isinstance(error, ProtocolError):
        return refusal(ErrorCode.MALFORMED, str(error), last=True)
    if isinstance(error, WorkerRefused):
        return refusal(ErrorCode.BUSY, str(error), last=True)
    return None


log = logging.getLogger(__name__)
AT_ONCE_BYTES = 256 * KIB
"""Requests with no larger payload are answered by the thread that read them: to wake another one takes longer than to
receive the next meanwhile would save."""


@dataclass(frozen=True)
class Service:
    """What all connections of a worker share."""

    answerer: Answerer
    sessions: Sessions
    recorder: Recorder | None = None
    on_failure: Callable[[], None] = lambda: None
    """Called when the recorder failed: the worker is to stop."""


@dataclass(frozen=True, slots=True)
class Unsent:
    """A reply that the socket did not take whole."""

    item: Request | Reply
    reply: Reply
    rest: Sequence[Buffer]

    @property
    def header(self) -> Header:
        """Of what it answers."""
        return self.item.header


class Connection:
    """Serves one transport until either side ends it, then closes it."""

    def __init__(
        self, transport: Transport, peer: str, service: Service, on_handshake: Callable[[], None] = lambda: None
    ) -> None:
        """A connection of that peer (see `quota`); `on_handshake` is called once it has a session."""
        self._transport = transport
        self._peer = peer
        self._service = service
        self._on_handshake = on_handshake
        self._store = service.answerer.store
        self._buffers = Buffers(pinned=service.answerer.computer.device.type == "cuda")
        self._inbox: queue.SimpleQueue[Request | Reply | Unsent | None] = queue.SimpleQueue()
        self._answering: threading.Thread | None = None
        self._handed_over = 0
        self._lock = threading.Lock()
        self._label = "before its handshake"

    def serve(self) -> None:
        """Shake hands, then read requests until the end; returns when the last reply is sent."""
        try:
            session = self._shake_hands()
        except WireError as error:
            log.info("a connection did not finish its handshake: %s", error)
            self._send_last(farewell(error))
            self._transport.close()
            return
        try:
            self._serve(session)
        finally:
            self._transport.close()
            self._service.sessions.leave(session, self._transport.shutdown)
        log.info("session %s: connection closed", self._label)

    def _serve(self, session: Session) -> None:
        reader = RequestReader(self._transport, session.key, self._store, self._buffers)
        try:
            last = self._read_all(session, reader)
            if last is not None or self._answering is not None:
                self._hand_over(session, reader, last).join()
            self._linger()
        finally:
            self._give_up_claims()

    def _shake_hands(self) -> Session:
        deadline = Deadline(HANDSHAKE_SECONDS)
        key = read_hello(self._transport, self._peer, deadline)
        session = self._service.sessions.enter(key, self._transport.shutdown)
        self._label = session_label(key)
        log.info("session %s: connected (%s)", self._label, self._peer)
        try:
            self._on_handshake()
            body = Hello(bytes(32)).pack()  # without the session id, which is a key and is not kept
            self._record("request", Header(MessageType.HELLO, payload_bytes=len(body)), body)
            reply = welcome(self._store.quota.of_one_peer, self._features)
            self._record_reply(reply)
            send_message(self._transport, reply.header, reply.payload, deadline=deadline)
        except BaseException:
            self._service.sessions.leave(session, self._transport.shutdown)
            raise
        return session

    @property
    def _features(self) -> int:
        features = self._service.answerer.features
        return features | SHARED_MEMORY if self._transport.shares_memory else features

    def _read_all(self, session: Session, reader: RequestReader) -> Reply | None:
        """Read requests until the end; answer them, or hand them over. Returns what to say last, None for nothing."""
        item: Request | Reply | None = None
        try:
            while True:
                item = reader.next()
                session.touch()
                if not self._is_for_this_thread(item):
                    self._hand_over(session, reader, item)
                elif (unsent := self._respond(session, reader, item)) is not None:
                    self._hand_over(session, reader, unsent)
        except StorageError as error:
            log.error("%s", error)  # noqa: TRY400 - one line, no traceback
            self._service.on_failure()
            return refusal(ErrorCode.FAILED, str(error), item.header if item else None, last=True)
        except WireError as error:
            log.info("session %s: %s", self._label, error)
            return farewell(error)
        except (RuntimeError, MemoryError) as error:  # what torch raises where memory cannot be had
            log.error("session %s: %s", self._label, error)  # noqa: TRY400 - one line, no traceback
            return refusal(ErrorCode.FAILED, f"no memory for this request: {error}", last=True)

    def _is_for_this_thread(self, item: Request | Reply) -> bool:
        """Whether the reader answers it itself: it has few bytes, and nothing is to be answered before it."""
        return self._handed_over == 0 and item.header.payload_bytes <= AT_ONCE_BYTES

    def _hand_over(
        self, session: Session, reader: RequestReader, item: Request | Reply | Unsent | None
    ) -> threading.Thread:
        """Have the other thread answer that, or send it; None is the end. Returns that thread."""
        with self._lock:
            self._handed_over += 1
        self._inbox.put(item)
        if self._answering is None:
            answering = threading.Thread(
                target=self._answer_all, args=(session, reader), name=f"answer-{self._label}", daemon=True
            )
            answering.start()
            self._answering = answering
        return self._answering

    def _answer_all(self, session: Session, reader: RequestReader) -> None:
        """Answer what is in the inbox, in order, until its end or the first reply that cannot be sent."""
        finished = False
        item: Request | Reply | Unsent | None = None
        try:
            while (item := self._inbox.get()) is not None:
                unsent = item if isinstance(item, Unsent) else self._respond(session, reader, item)
                if unsent is not None:
                    size = sum(len(view) for view in unsent.rest)
                    self._transport.send(unsent.rest, Deadline(STALL_SECONDS + transfer_seconds(size)))
                    self._give_back(unsent.item, unsent.reply)
                with self._lock:
                    self._handed_over -= 1
                if isinstance(item, Reply) and item.last:
                    break
            finished = True
        except WireError as error:
            log.info("session %s: %s", self._label, error)
        except StorageError as error:
            log.error("%s", error)  # noqa: TRY400 - one line, no traceback
            self._send_last(refusal(ErrorCode.FAILED, str(error), item.header if item else None, last=True))
            self._service.on_failure()
        finally:
            if not finished:
                self._transport.shutdown()  # so that the reader ends too

    def _respond(self, session: Session, reader: RequestReader, item: Request | Reply) -> Unsent | None:
        """Answer one request, or say what the reader had to say itself; what cannot be sent at once is left."""
        reply = self._answer(session, item) if isinstance(item, Request) else item
        reader.settle(item.header)
        if self._service.recorder is not None:
            self._record_reply(reply)
        rest = self._transport.send_now((reply.header.pack(), reply.payload))
        if rest:
            return Unsent(item, reply, rest)
        self._give_back(item, reply)
        return None

    def _give_back(self, item: Request | Reply, reply: Reply) -> None:
        """Memory that is used over and over."""
        if isinstance(item, Request) and item.buffer is not None:
            self._buffers.give_back(item.buffer)
        if reply.product is not None and reply.payload:
            self._buffers.give_back(reply.product)

    def _answer(self, session: Session, request: Request) -> Reply:
        try:
            if self._service.recorder is not None:
                self._record("request", request.header.inline(), request.payload)
            return self._service.answerer.answer(session.key, request, self._buffers)
        finally:
            if request.claim is not None:
                request.claim.release()  # what was stored has one of its own

    def _record_reply(self, reply: Reply) -> None:
        if self._service.recorder is not None:
            seen = reply.payload if reply.product is None else bytes_of(reply.product.matrix)
            self._record("reply", reply.header.inline(), seen)

    def _send_last(self, reply: Reply | None) -> None:
        """Say why, to a peer that may not listen any more, and not in the transcript of a session."""
        if reply is None:
            return
        try:
            send_message(self._transport, reply.header, reply.payload, deadline=Deadline(LINGER_SECONDS))
            self._linger()
        except WireError as error:
            log.info("session %s: %s", self._label, error)

    def _linger(self) -> None:
        """Read on, for a moment, until the peer closes: closing with unread bytes would take our last words from it."""
        scratch = memoryview(bytearray(CHUNK_BYTES))
        deadline = Deadline(LINGER_SECONDS)
        try:
            self._transport.stop_sending()
            while self._transport.recv_into(scratch, deadline):
                pass
        except WireError as error:
            log.debug("session %s: %s", self._label, error)

    def _record(self, direction: Direction, header: Header, payload: Buffer) -> None:
        if self._service.recorder is not None:
            self._service.recorder.record(direction, self._label, header, payload)

    def _give_up_claims(self) -> None:
        """Requests that nobody will answer any more: only the room that a STORE has claimed is left to give back."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Request) and item.claim is not None:
                item.claim.release()
