"""One connection to a worker: says what is asked, and takes nothing for a reply that does not answer it.

No retries here: whatever goes wrong is raised, and the connection is not used again.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from obfuscatune.enclave.client.allocator import Allocator
from obfuscatune.enclave.client.requests import Awaited, Request, StoredMatrix
from obfuscatune.enclave.client.retry import ClientStats
from obfuscatune.errors import (
    AdapterLost,
    LimitExceeded,
    MalformedMessage,
    ProtocolError,
    QuotaExceeded,
    UnknownMatrix,
    UnsupportedVersion,
    WireError,
    WorkerRefused,
)
from obfuscatune.protocol.framing import recv_body, recv_header_bytes, recv_payload, send_message
from obfuscatune.protocol.limits import IDLE_CHECK_SECONDS
from obfuscatune.protocol.messages import HEADER_BYTES, NO_MATRIX, REPLIES, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import (
    ACCELERATOR,
    CONTENT_STORE,
    SERVES_WEIGHTS,
    SHARED_MEMORY,
    Hello,
    Places,
    Welcome,
    error_text,
    pack_number,
)
from obfuscatune.protocol.shared_memory import SharedMemory
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.transport import Buffer, Deadline, Transport, transfer_seconds

REFUSALS: dict[ErrorCode, type[WireError]] = {
    ErrorCode.MALFORMED: ProtocolError,
    ErrorCode.VERSION: UnsupportedVersion,
    ErrorCode.LIMIT: LimitExceeded,
    ErrorCode.UNKNOWN_MATRIX: UnknownMatrix,
    ErrorCode.QUOTA: QuotaExceeded,
    ErrorCode.SHAPE: WorkerRefused,
    ErrorCode.BUSY: WorkerRefused,
    ErrorCode.FAILED: WorkerRefused,
    ErrorCode.UNKNOWN_ADAPTER: AdapterLost,
}
CONNECTS_ANEW = frozenset({ErrorCode.MALFORMED})
"""After these an enclave connects again and asks again, a bounded number of times; any other is final, but that a
matrix which the worker does not hold is stored again (docs/spec/wire.md, Errors)."""

_NOBODYS = b"\xff" * 16
"""An id that no matrix has: a worker is asked to forget it for the sake of its answer."""


class Refused(WireError):
    """The worker answered one request, or all, with an error that is final; `error` is for the caller."""

    def __init__(self, error: WireError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class LaidOut:
    """A matrix in shared memory, for as long as this is kept."""

    matrix: torch.Tensor
    offset: int


class ClientConnection:
    """A transport on which the handshake is done. Closes the transport when the handshake fails."""

    def __init__(self, transport: Transport, session_id: bytes, stats: ClientStats, deadline: Deadline) -> None:
        self._transport = transport
        self._stats = stats
        self._heard_at = time.monotonic()
        self.allocator: Allocator | None = None
        """Memory shared with the worker, after `share`."""
        try:
            body = Hello(session_id).pack()
            self.send(Header(MessageType.HELLO, payload_bytes=len(body)), body, deadline)
            header = self.parsed(self.receive(deadline))
            if header.type is MessageType.ERROR:
                raise self.refusal(header, deadline)
            if header.type is not MessageType.WELCOME:
                raise MalformedMessage(f"expected WELCOME, got {header.type.name}")
            self.welcome = Welcome.unpack(self.body(header, deadline))
        except BaseException:
            transport.close()
            raise

    @property
    def wants_digests(self) -> bool:
        """Whether the worker keeps matrices by their content."""
        return bool(self.welcome.features & CONTENT_STORE)

    @property
    def serves_weights(self) -> bool:
        """Whether the worker has published weights of its own."""
        return bool(self.welcome.features & SERVES_WEIGHTS)

    @property
    def computes_apart(self) -> bool:
        """Whether the worker computes on other cores than this process's: on a device, or on another host."""
        return bool(self.welcome.features & ACCELERATOR) or not self._transport.is_local

    @property
    def is_idle(self) -> bool:
        """Whether nothing came for so long that the worker, or something on the way, may have given it up."""
        return time.monotonic() - self._heard_at > IDLE_CHECK_SECONDS

    def is_alive(self, request_id: int) -> bool:
        """Look whether the worker has closed it; over a network, also ask for a sign of life. Nothing is in flight.

        What is on the way (a NAT, a proxy, a firewall) may have forgotten the connection and swallow all that is sent.
        """
        if self.has_news():
            return False
        if self._transport.shares_memory:
            self._heard_at = time.monotonic()  # on one host nothing is lost on the way
            return True
        header = Header(MessageType.FORGET, request_id, _NOBODYS)
        try:
            self.exchange(header, b"", {MessageType.DONE}, Deadline(IDLE_CHECK_SECONDS))
        except WireError:
            return False
        return True

    def share(self, request_id: int, size: int, deadline: Deadline) -> None:
        """Share memory with the worker, where it is on this host and there is some; else this does nothing."""
        if not self.welcome.features & SHARED_MEMORY or not self._transport.shares_memory:
            return
        try:
            memory, descriptor = SharedMemory.create(size)
        except OSError:
            return  # rows are sent through the socket then
        try:
            header = Header(MessageType.SHARE, request_id, payload_bytes=8)
            self.exchange(header, pack_number(size), {MessageType.DONE}, deadline, descriptor)
        except Refused:
            return  # the same
        finally:
            os.close(descriptor)
        self.allocator = Allocator(memory)

    def lay_out(self, elements: torch.Tensor) -> LaidOut | None:
        """A copy of a matrix in the memory that is shared; None where there is none, or no room."""
        rows, cols = elements.shape
        copy = None if self.allocator is None else self.allocator.allocate(rows, cols, elements.dtype)
        offset = None if self.allocator is None or copy is None else self.allocator.offset_of(copy)
        return None if copy is None or offset is None else LaidOut(copy.copy_(elements), offset)

    def places(self, request: Request) -> Places | None:
        """Where rows and product lie in the memory of this connection; None where the rows do not, or it is full."""
        request.output = None
        allocator = self.allocator
        offset = None if allocator is None else allocator.offset_of(request.rows)
        if allocator is None or offset is None:
            return None
        output = allocator.allocate(*request.shape, request.dtype)
        output_offset = None if output is None else allocator.offset_of(output)
        if output_offset is None:
            return None
        request.output = output
        return Places(offset, output_offset)

    def send(self, header: Header, payload: Buffer, deadline: Deadline, descriptor: int | None = None) -> None:
        """Send one request."""
        send_message(self._transport, header, payload, deadline=deadline, descriptor=descriptor)
        self._stats.bytes_sent += header.message_bytes

    def receive(self, deadline: Deadline) -> bytearray:
        """The 56 bytes of the next reply's header, for `product` or `parsed`."""
        started = time.perf_counter()
        try:
            return recv_header_bytes(self._transport, deadline)
        finally:
            self._heard_at = time.monotonic()
            self._stats.seconds_waiting += time.perf_counter() - started

    def parsed(self, data: bytearray) -> Header:
        """The header that was received, checked; its payload is to be taken next, by `body` or `refusal`."""
        header = Header.unpack(data, expected=REPLIES)
        self._stats.bytes_received += header.message_bytes
        return header

    def has_news(self, seconds: float = 0.0) -> bool:
        """Wait so long at most; whether a reply is there, or the connection's end."""
        return self._transport.has_news(seconds)

    def wake(self) -> None:
        """End what waits in another thread."""
        self._transport.shutdown()

    def body(self, header: Header, deadline: Deadline) -> bytes:
        """The payload of a reply that carries no matrix."""
        return recv_body(self._transport, header, deadline)

    def refusal(self, header: Header, deadline: Deadline) -> WireError:
        """The error that an ERROR stands for; one that is final comes as `Refused`."""
        text = error_text(self.body(header, deadline))
        code = ErrorCode(header.code)
        error = REFUSALS[code](f"the worker answered: {text}")
        return error if code in CONNECTS_ANEW else Refused(error)

    def exchange(
        self,
        header: Header,
        payload: Buffer,
        allowed: set[MessageType],
        deadline: Deadline,
        descriptor: int | None = None,
    ) -> MessageType:
        """Send one request that carries no product, and take its reply. Nothing else may be in flight.

        Raises:
            Refused: the worker answered this request with an error that is final.
            ProtocolError: it says that the request broke the protocol.
            MalformedMessage: the reply is not of an `allowed` type, or answers something else.
        """
        self.send(header, payload, deadline, descriptor)
        reply = self.parsed(self.receive(deadline))
        if reply.type is MessageType.ERROR and reply.request_id in (0, header.request_id):
            raise self.refusal(reply, deadline)
        if reply.type not in allowed or (reply.request_id, reply.matrix_id) != (header.request_id, header.matrix_id):
            raise MalformedMessage(f"{reply.type.name} came, which does not answer {header.type.name}")
        return reply.type

    def product(self, awaited: Awaited, deadline: Deadline) -> torch.Tensor:
        """The matrix of a PRODUCT whose header is the one awaited."""
        started = time.perf_counter()
        try:
            recv_payload(self._transport, awaited.payload, deadline)
        finally:
            self._stats.seconds_waiting += time.perf_counter() - started
        self._stats.bytes_received += HEADER_BYTES + awaited.product.nbytes
        return awaited.product

    def begin_in_child(self) -> None:
        """In a forked child: leave the connection to the parent."""
        if self.allocator is not None:
            self.allocator.begin_in_child()
        self._transport.close()

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()


FAREWELL_SECONDS = 5.0
"""How long `forget_all` waits for the worker to confirm that it has forgotten everything."""
_ANSWERS = {
    MessageType.OFFER: {MessageType.HAVE, MessageType.WANT},
    MessageType.STORE: {MessageType.STORED},
    MessageType.FORGET: {MessageType.DONE},
}


class Uploads:
    """Asks for one thing at a time, and waits. Everything here raises as `ClientConnection.exchange` does."""

    def __init__(self, stats: ClientStats, next_id: Callable[[], int], deadline_s: float) -> None:
        self._stats, self._next_id, self._deadline_s = stats, next_id, deadline_s

    def upload(self, connection: ClientConnection, matrix: StoredMatrix) -> None:
        """Offer a matrix, and send it if the worker has not got it."""
        digest, weights = connection.wants_digests, connection.serves_weights
        offer, body = matrix.offer(self._next_id(), digest=digest, weights=weights)
        if self._ask(connection, offer, body) is not MessageType.WANT:
            self._stats.served += 1
            return
        elements = matrix.elements()
        laid = connection.lay_out(elements)
        payload = bytes_of(elements) if laid is None else pack_number(laid.offset)
        self._ask(connection, matrix.store(self._next_id(), shared=laid is not None), payload)
        self._stats.uploads += 1
        self._stats.bytes_uploaded += matrix.nbytes

    def forget(self, connection: ClientConnection, matrix_id: bytes) -> None:
        """Have the worker drop one matrix."""
        self._ask(connection, Header(MessageType.FORGET, self._next_id(), matrix_id))

    def forget_all(self, connection: ClientConnection) -> None:
        """Have the worker drop all of the session."""
        self._ask(connection, Header(MessageType.FORGET, self._next_id(), NO_MATRIX), seconds=FAREWELL_SECONDS)

    def _ask(
        self, connection: ClientConnection, header: Header, payload: Buffer = b"", seconds: float | None = None
    ) -> MessageType:
        deadline = Deadline(seconds or self._deadline_s + transfer_seconds(header.message_bytes))
        return connection.exchange(header, payload, _ANSWERS[header.type], deadline)
