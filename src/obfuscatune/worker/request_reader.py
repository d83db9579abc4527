"""What a connection lets in: the next request, within the limits that WELCOME announced."""

import threading

from obfuscatune.errors import LimitExceeded, MalformedMessage, QuotaExceeded
from obfuscatune.protocol.framing import recv_body, recv_header, recv_payload
from obfuscatune.protocol.limits import (
    CHUNK_BYTES,
    CONNECTION_IDLE_SECONDS,
    EMPTY_IDLE_SECONDS,
    MAX_IN_FLIGHT,
    MAX_WINDOW_BYTES,
    STALL_SECONDS,
)
from obfuscatune.protocol.messages import REQUESTS, WITH_ROWS, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Offer, Places, Step, unpack_number
from obfuscatune.protocol.shared_memory import SharedMemory
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.transport import Deadline, Transport, transfer_seconds
from obfuscatune.worker.buffers import Buffers, copy_of, matrix_memory
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.replies import Reply, Request, RequestError, refusal
from obfuscatune.worker.store import MatrixStore


class TooManyInFlight(LimitExceeded):
    """More requests await their reply than WELCOME allowed."""


class RequestReader:
    """Reads the requests of one connection, by one thread; another one reports what was answered."""

    def __init__(self, transport: Transport, session: SessionKey, store: MatrixStore, buffers: Buffers) -> None:
        self._transport = transport
        self._session = session
        self._store = store
        self._buffers = buffers
        self._shared: SharedMemory | None = None
        self._in_flight = 0
        self._window_bytes = 0
        self._lock = threading.Lock()

    def next(self) -> Request | Reply:
        """Wait for the next request; a STORE for which there is no room comes back as its refusal.

        Raises:
            ConnectionLost: the peer closed.
            DeadlineExceeded: it fell silent in the middle of a request, or was idle for too long.
            ProtocolError: it broke the protocol.
        """
        idle = CONNECTION_IDLE_SECONDS if self._store.held_by(self._session) else EMPTY_IDLE_SECONDS
        header = recv_header(self._transport, REQUESTS, deadline=Deadline(idle), rest_seconds=STALL_SECONDS)
        deadline = Deadline(STALL_SECONDS + transfer_seconds(header.payload_bytes))
        if header.type is MessageType.HELLO:
            raise MalformedMessage("HELLO came a second time")
        self._admit(header)
        if header.type is MessageType.STORE:
            return self._matrix(header, deadline)
        if header.shared:
            return self._in_shared_memory(header, deadline)
        if header.type in WITH_ROWS:
            buffer = self._buffers.allocate(header.rows, header.cols, header.dtype.torch_dtype)
            recv_payload(self._transport, buffer.view, deadline)
            return Request(header, tensor=buffer.matrix, buffer=buffer)
        body = recv_body(self._transport, header, deadline)
        if header.type is MessageType.SHARE:
            self._share(unpack_number(body))
        if header.type is MessageType.OFFER:
            Offer.unpack(body)
        if header.type is MessageType.ATTACH:
            Attachment.unpack(body, header.cols)
        if header.type is MessageType.STEP:
            Step.unpack(body)
        return Request(header, body)

    def settle(self, header: Header) -> None:
        """A request is about to be answered. Not later: whoever has the reply may send the next request at once."""
        with self._lock:
            self._in_flight -= 1
            self._window_bytes -= _window_share(header)

    def _admit(self, header: Header) -> None:
        share = _window_share(header)
        with self._lock:
            self._in_flight += 1
            self._window_bytes += share
            if self._in_flight > MAX_IN_FLIGHT:
                raise TooManyInFlight(f"more than {MAX_IN_FLIGHT} requests await their reply")
            if self._window_bytes > MAX_WINDOW_BYTES:
                raise TooManyInFlight(f"more than {MAX_WINDOW_BYTES} bytes of requests await their reply")

    def _share(self, size: int) -> None:
        """Map the memory whose descriptor came along. A connection has one, from then on."""
        if self._shared is not None:
            raise MalformedMessage("this connection shares memory already")
        self._shared = SharedMemory.attach(self._transport.take_descriptor(), size)

    def _in_shared_memory(self, header: Header, deadline: Deadline) -> Request:
        """A request whose rows are read, and whose product is written, where the enclave says."""
        places = Places.unpack(recv_body(self._transport, header, deadline))
        rows = self._memory.matrix(places.rows, header.rows, header.cols, header.dtype.torch_dtype)
        return Request(header, tensor=rows, output=self._memory.place(places.product))

    @property
    def _memory(self) -> SharedMemory:
        """What the enclave shared.

        Raises:
            MalformedMessage: nothing.
        """
        if self._shared is None:
            raise MalformedMessage("a matrix in shared memory was announced, and no memory is shared")
        return self._shared

    def _matrix(self, header: Header, deadline: Deadline) -> Request | Reply:
        """A STORE. Its room is claimed before memory is asked for; without room, its bytes are thrown away.

        What lies in shared memory is copied at once: the enclave lays something else there, and could change it after
        a look at its content.
        """
        try:
            claim = self._store.reserve(self._session, header.matrix_bytes)
        except (QuotaExceeded, RequestError) as error:
            self._discard(header.payload_bytes, deadline)
            return refusal(error.code if isinstance(error, RequestError) else ErrorCode.QUOTA, str(error), header)
        shape = header.rows, header.cols, header.dtype.torch_dtype
        try:
            if header.shared:
                place = unpack_number(recv_body(self._transport, header, deadline))
                matrix = copy_of(self._memory.matrix(place, *shape))
            else:
                matrix = matrix_memory(*shape)
                recv_payload(self._transport, bytes_of(matrix), deadline)
        except BaseException:
            claim.release()
            raise
        return Request(header, tensor=matrix, claim=claim)

    def _discard(self, size: int, deadline: Deadline) -> None:
        scratch = memoryview(bytearray(min(size, CHUNK_BYTES)))
        while size:
            part = scratch[: min(size, len(scratch))]
            recv_payload(self._transport, part, deadline)
            size -= len(part)


def _window_share(header: Header) -> int:
    return header.payload_bytes if header.type in WITH_ROWS else 0
