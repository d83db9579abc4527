"""One connection of an enclave: a thread that always reads, and one that answers in order.

That the first never waits for the second is what a client relies on: with no more than max_in_flight requests outstanding it
may send all of them before it reads a reply, and neither side ever waits for the other for ever.
"""

import logging
import queue
import threading
from dataclasses import dataclass

import torch

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import (
    ConnectionLost,
    LimitExceeded,
    MalformedMessage,
    ProtocolError,
    QuotaExceeded,
    Truncated,
    UnsupportedVersion,
    WireError,
    WorkerRefused,
)
from obfuscatune.wire.framing import recv_body, recv_header, recv_payload, send_message
from obfuscatune.wire.limits import (
    CHUNK_BYTES,
    HANDSHAKE_SECONDS,
    MAX_IN_FLIGHT,
    MAX_MATRIX_BYTES,
    MAX_WINDOW_BYTES,
    STALL_SECONDS,
    VERSION,
)
from obfuscatune.wire.messages import REQUESTS, ErrorCode, Header, Hello, MessageType, Welcome
from obfuscatune.wire.tensors import bytes_of
from obfuscatune.wire.transport import Transport
from obfuscatune.worker.answer import Answerer, Reply, Request, refusal, refusal_for
from obfuscatune.worker.sessions import Sessions, session_key, session_label

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What all connections of a worker share."""

    answerer: Answerer
    sessions: Sessions
    features: int = 0


class Connection:
    """Serves one transport until either side ends it."""

    def __init__(self, transport: Transport, service: Service) -> None:
        self._transport = transport
        self._service = service
        self._session = b""
        self._inbox: queue.SimpleQueue[Request | Reply | None] = queue.SimpleQueue()
        self._outstanding = 0
        self._outstanding_bytes = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Handshake, then read requests until the end; returns when the last reply is sent."""
        try:
            entered = self._welcome()
        except WireError as error:
            log.info("a connection ended before its greeting: %s", error)
            self._transport.close()
            return
        if not entered:
            self._transport.close()
            return
        label = session_label(self._session)
        log.info("session %s: connected", label)
        answering = threading.Thread(target=self._answer_all, name=f"answer-{label}", daemon=True)
        answering.start()
        self._inbox.put(self._read_all())
        answering.join()
        self._transport.close()
        self._service.sessions.leave(self._session, keep=self._service.answerer.store.holds_any(self._session))
        log.info("session %s: connection closed", label)

    def _welcome(self) -> bool:
        """HELLO and WELCOME; False when it was refused. Raises WireError when nobody is left to tell."""
        deadline = Deadline(HANDSHAKE_SECONDS)
        try:
            header = recv_header(self._transport, frozenset({MessageType.HELLO}), deadline=deadline)
            hello = Hello.unpack(recv_body(self._transport, header, deadline))
            if not hello.oldest <= VERSION <= hello.newest:
                raise UnsupportedVersion(f"versions {hello.oldest} to {hello.newest} offered, {VERSION} spoken here")
            self._session = session_key(hello.session_id)
            self._service.sessions.enter(self._session)
        except UnsupportedVersion as error:
            self._send(refusal(ErrorCode.VERSION, str(error), last=True), deadline)
            return False
        except ProtocolError as error:
            self._send(refusal_for(error), deadline)
            return False
        except WorkerRefused as error:
            self._send(refusal(ErrorCode.BUSY, str(error), last=True), deadline)
            return False
        quota = self._service.answerer.store.quota_bytes
        body = Welcome(
            VERSION,
            MAX_IN_FLIGHT,
            self._service.features,
            MAX_WINDOW_BYTES,
            min(MAX_MATRIX_BYTES, quota),
            quota,
        ).pack()
        self._send(Reply(Header(MessageType.WELCOME, payload_bytes=len(body)), body), deadline)
        return True

    def _read_all(self) -> Reply | None:
        """Read requests into the inbox until the end. Returns what to say last, None for nothing."""
        while True:
            try:
                self._inbox.put(self._read())
            except QuotaRefused as refused:
                self._inbox.put(refused.reply)
            except ProtocolError as error:
                log.warning("session %s: %s", session_label(self._session), error)
                return None if isinstance(error, Truncated) else refusal_for(error)
            except _TooMany as error:
                return refusal(ErrorCode.IN_FLIGHT, str(error), last=True)
            except WireError as error:
                log.info("session %s: %s", session_label(self._session), error)
                return None

    def _read(self) -> Request:
        header = recv_header(self._transport, REQUESTS, rest_seconds=STALL_SECONDS)
        self._count(header)
        deadline = Deadline(STALL_SECONDS)
        if header.type is MessageType.HELLO:
            raise MalformedMessage("HELLO came a second time")
        if header.type is MessageType.STORE:
            return self._read_matrix(header)
        if header.type is MessageType.MULTIPLY:
            return Request(header, tensor=self._read_tensor(header, deadline))
        return Request(header, recv_body(self._transport, header, deadline))

    def _read_matrix(self, header: Header) -> Request:
        """A STORE: its room is claimed first. Without room, its bytes are thrown away as they come."""
        deadline = Deadline(STALL_SECONDS)
        store = self._service.answerer.store
        try:
            store.reserve(header.payload_bytes)
        except QuotaExceeded as error:
            self._discard(header.payload_bytes, deadline)
            raise QuotaRefused(refusal(ErrorCode.QUOTA, str(error), header)) from error
        try:
            return Request(header, tensor=self._read_tensor(header, deadline))
        except BaseException:
            store.release(header.payload_bytes)
            raise

    def _read_tensor(self, header: Header, deadline: Deadline) -> torch.Tensor:
        tensor = torch.empty(header.rows, header.cols, dtype=header.dtype.torch_dtype)
        recv_payload(self._transport, bytes_of(tensor), deadline)
        return tensor

    def _discard(self, size: int, deadline: Deadline) -> None:
        scratch = memoryview(bytearray(min(size, CHUNK_BYTES)))
        while size:
            part = scratch[: min(size, len(scratch))]
            recv_payload(self._transport, part, deadline)
            size -= len(part)

    def _count(self, header: Header) -> None:
        """Hold the client to what WELCOME said."""
        with self._lock:
            self._outstanding += 1
            self._outstanding_bytes += header.payload_bytes if header.type is MessageType.MULTIPLY else 0
            if self._outstanding > MAX_IN_FLIGHT:
                raise _TooMany(f"more than {MAX_IN_FLIGHT} requests await their reply")
            if self._outstanding_bytes > MAX_WINDOW_BYTES:
                raise LimitExceeded(f"more than {MAX_WINDOW_BYTES} bytes of requests await their reply")

    def _uncount(self, header: Header) -> None:
        """Before the reply leaves: whoever has it may send the next request at once."""
        with self._lock:
            self._outstanding -= 1
            self._outstanding_bytes -= header.payload_bytes if header.type is MessageType.MULTIPLY else 0

    def _answer_all(self) -> None:
        """Answer what is in the inbox, in order, until its end or the first reply that cannot be sent."""
        while True:
            item = self._inbox.get()
            if item is None:
                return
            if isinstance(item, Request):
                reply = self._service.answerer.answer(self._session, item)
                self._uncount(item.header)
            else:
                reply = item
                if not item.last:
                    self._uncount(item.header)
            try:
                self._send(reply, Deadline(STALL_SECONDS))
            except WireError as error:
                log.info("session %s: %s", session_label(self._session), error)
                self._transport.shutdown()  # so that the reader ends too
                return
            if reply.last:
                return

    def _send(self, reply: Reply, deadline: Deadline) -> None:
        send_message(self._transport, reply.header, reply.payload, deadline=deadline)


class QuotaRefused(WorkerRefused):
    """A STORE without room for it; carries the reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__("no room")
        self.reply = reply


class _TooMany(ConnectionLost):
    """More requests in flight than WELCOME allowed."""
