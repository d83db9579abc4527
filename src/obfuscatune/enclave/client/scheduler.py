"""Schedules the requests of one link, and sends them again after a connection is lost.

`Scheduler` is a state machine that whoever waits for an answer drives, one step at a time: it has no thread of its
own, so a request that is answered at once passes no other thread on its way. All that a step changes survives the loss
of the connection: requests that were sent go back to those that wait, and get a new id when they are sent again, so
that no reply of an earlier connection, nor a reply played a second time, is ever taken for an answer.
"""

import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

from obfuscatune.enclave.client.allocator import Allocator
from obfuscatune.enclave.client.connection import ClientConnection, Refused, Uploads
from obfuscatune.enclave.client.requests import Request, StoredMatrix, check_product
from obfuscatune.enclave.client.retry import ClientStats, Insistence, Refusal, RetryPolicy
from obfuscatune.errors import (
    BadReply,
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    MalformedMessage,
    ProtocolError,
    UnknownMatrix,
    WireError,
)
from obfuscatune.protocol.limits import SHARED_BYTES
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.tensors import bytes_of
from obfuscatune.protocol.transport import Deadline, Transport

RETRIED = (ConnectionLost, DeadlineExceeded, ProtocolError, BadReply)


class State(Enum):
    """What a link does next; see `Scheduler`."""

    CONNECT = "connect"
    CHECK = "check"
    SEND = "send"
    RECEIVE = "receive"
    UPLOAD = "upload"
    FORGET = "forget"


class Scheduler:
    """The state of a link. Not safe from several threads: `WorkerClient` lets one in at a time.

    The state follows from what is connected, in flight and waiting; the first line that applies counts:

    | state   | when                                             | step                   | afterwards         |
    |---------|--------------------------------------------------|------------------------|--------------------|
    | CONNECT | no connection                                    | greet, share memory    | connected          |
    | SEND    | in flight, and one more may be: one that waits,  | send the first request | one more in flight |
    |         | within the worker's limits, and nothing to be    |                        |                    |
    |         | uploaded or forgotten                            |                        |                    |
    | RECEIVE | in flight otherwise                              | take one reply         | one less in flight |
    | CHECK   | nothing was heard for a while                    | ask for a sign of life | heard, or CONNECT  |
    | UPLOAD  | the worker lacks a matrix                        | offer it, store it     | it lacks one less  |
    | FORGET  | the worker is to forget a matrix                 | have it forgotten      | one less to forget |
    | SEND    | otherwise                                        | send the first request | one in flight      |

    Uploads and the like have the connection to themselves. Whatever fails in a step leads to CONNECT: what was in
    flight waits again, but for what must not be done twice (`Request.interrupted`).
    """

    def __init__(self, connect: Callable[[], Transport], deadline_s: float, retry: RetryPolicy) -> None:
        self.stats = ClientStats()
        self.missing: dict[bytes, StoredMatrix] = {}
        """To be uploaded."""
        self.leaving: dict[bytes, None] = {}
        """To be forgotten by the worker."""
        self.waiting: list[Request] = []
        """To be sent, in this order."""
        self.matrices: dict[bytes, StoredMatrix] = {}
        self._connect = connect
        self._deadline_s = deadline_s
        self._retry = retry
        self._session_id = secrets.token_bytes(32)
        self._connection: ClientConnection | None = None
        self._transport: Transport | None = None
        """Of the connection, or of the handshake that is to make it one."""
        self._connected_before = False
        self.broken_off = False
        """Whether nothing is to be driven on; set by another thread."""
        self.refusal = Refusal()
        self.is_to_read: Callable[[ClientConnection, Deadline], bool] | None = None
        """Lets other threads send until a reply is there; whether this thread is to read it, or to look again what is
        next. None while one thread alone uses the link: it reads, and sleeps in reading."""
        self._last_id = 0
        self._uploads = Uploads(self.stats, self._next_id, deadline_s)
        self._in_flight: OrderedDict[int, Request] = OrderedDict()

    @property
    def allocator(self) -> Allocator | None:
        """The memory shared with the worker that is connected now."""
        return None if self._connection is None else self._connection.allocator

    @property
    def computes_apart(self) -> bool:
        """Whether the worker that is connected now computes on other cores than this process's."""
        return self._connection is not None and self._connection.computes_apart

    @property
    def connected(self) -> bool:
        """Whether there is a connection that has not failed yet."""
        return self._connection is not None

    def drive(self, done: Callable[[], bool], retry: RetryPolicy | None = None) -> None:
        """Step until `done`, within the bounds of `retry` or else those of the link.

        Raises:
            WireError: the worker failed more often, or longer, than the policy bears. All that waited has failed with
                it.
        """
        insistence: Insistence | None = None
        products = self.stats.crossings
        while not done():
            self.refusal.check()
            if self.broken_off:
                raise ConnectionLost("the link to the worker was broken off on this side")
            connected = self.connected
            try:
                self.step()
            except RETRIED as error:
                self.disconnect()
                self.refusal.check()
                if self.broken_off:
                    raise
                insistence = insistence or Insistence(retry or self._retry, products)
                try:
                    insistence.after(error, connected=connected, products=self.stats.crossings)
                except WireError as final:
                    self._fail(self.waiting, final)
                    raise
            except Refused as refused:
                self.disconnect()
                raise refused.error from None
            except BaseException:
                # Ctrl-C too: the stream may be in the middle of a message, and is of no use any more.
                self.disconnect()
                raise

    def break_off(self) -> None:
        """Have what is driven by another thread fail: it is woken where it waits for the worker."""
        self.broken_off = True
        transport = self._transport
        if transport is not None:
            transport.shutdown()

    def refuse(self, error: WireError) -> None:
        """Ask this worker nothing any more, for good, because of `error`. From any thread."""
        self.refusal.declare(error)
        if self._transport is not None:
            self._transport.shutdown()

    def give_up(self, request: Request) -> None:
        """Nobody waits for this one any more: it is not sent again."""
        if request in self.waiting:
            self.waiting.remove(request)

    def disconnect(self) -> None:
        """Drop the connection; what was sent and not answered waits to be sent again."""
        for request in self._in_flight.values():
            request.interrupted()
        self.waiting[:0] = [request for request in self._in_flight.values() if not request.done]
        self._in_flight.clear()
        if self._connection is not None:
            if self.is_to_read is not None:
                with contextlib.suppress(WireError):  # lost already
                    self._connection.wake()
            self._connection.close()
            self._connection = None

    def begin_in_child(self) -> None:
        """In a forked child: the connection, its memory and all that was asked for on it are the parent's.

        Nothing is said on the connection; closing it here leaves the parent's descriptor of it open.
        """
        for request in [*self.waiting, *self._in_flight.values()]:
            if not request.done:
                request.error = ConnectionLost("the process that this one was forked from asked for this: ask again")
        self.waiting.clear()
        self._in_flight.clear()
        self._transport = None
        self.broken_off = self._connected_before = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.begin_in_child()
        self._session_id = secrets.token_bytes(32)
        self.missing.clear()
        self.leaving.clear()

    def farewell(self) -> None:
        """Have the worker forget this session, where it is still connected, and disconnect."""
        try:
            self.refusal.check()
            if self._connection is not None and not self._in_flight:
                self._uploads.forget_all(self._connection)
        except WireError:
            return  # gone: it has forgotten, or will when the session expires
        finally:
            self.disconnect()

    @property
    def state(self) -> State:
        """What the next step does."""
        connection = self._connection
        if connection is None:
            return State.CONNECT
        if self._in_flight:
            is_next = (
                self.waiting and not (self.missing or self.leaving) and self._room_for(connection, self.waiting[0])
            )
            return State.SEND if is_next else State.RECEIVE
        if connection.is_idle:
            return State.CHECK
        if self.missing:
            return State.UPLOAD
        return State.FORGET if self.leaving else State.SEND

    def step(self) -> None:
        """Do what the state says.

        Raises:
            WireError: it failed; `drive` knows what then.
        """
        state, connection = self.state, self._connection
        if connection is None:
            self._shake_hands()
        elif state is State.SEND:
            self._send(connection, self.waiting[0])
        elif state is State.RECEIVE:
            deadline = next(iter(self._in_flight.values())).deadline
            if self.is_to_read is None or self.is_to_read(connection, deadline):
                self._receive(connection, deadline)
        elif state is State.CHECK:
            if not connection.is_alive(self._next_id()):
                self.disconnect()
        elif state is State.UPLOAD:
            self._upload(connection, next(iter(self.missing.values())))
        else:
            self._uploads.forget(connection, matrix_id := next(iter(self.leaving)))
            del self.leaving[matrix_id]

    def _shake_hands(self) -> None:
        deadline = Deadline(self._deadline_s)
        transport = self._transport = self._connect()
        if self.broken_off or self.refusal.is_declared:  # by whoever did not find it there yet
            transport.shutdown()
        connection = ClientConnection(transport, self._session_id, self.stats, deadline)
        try:
            connection.share(self._next_id(), SHARED_BYTES, deadline)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self.stats.reconnects += self._connected_before
        self._connected_before = True

    def _room_for(self, connection: ClientConnection, request: Request) -> bool:
        """Whether the worker reads one more request before it has answered those in flight."""
        welcome = connection.welcome
        size = sum(other.nbytes for other in self._in_flight.values()) + request.nbytes
        return len(self._in_flight) < welcome.max_in_flight and size <= welcome.window_bytes

    def _send(self, connection: ClientConnection, request: Request) -> None:
        window = connection.welcome.window_bytes
        if request.nbytes > window:
            self._fail([request], LimitExceeded(f"the worker takes {window} bytes in one call: split the rows"))
            return
        self.stats.retries += request.times_sent > 0
        request.times_sent += 1
        request.deadline = Deadline(self._deadline_s)
        request_id = self._next_id()
        places = connection.places(request)
        payload = bytes_of(request.rows) if places is None else places.pack()
        connection.send(request.header(request_id, shared=places is not None), payload, request.deadline)
        self.waiting.remove(request)
        self._in_flight[request_id] = request
        request.expect(request_id)

    def _receive(self, connection: ClientConnection, deadline: Deadline) -> None:
        """Take one reply, in whatever order the worker gives them."""
        data = connection.receive(deadline)
        for request_id, request in self._in_flight.items():
            if request.awaited is not None and request.awaited.header == data:
                product = connection.product(request.awaited, deadline)
                request.product = product if request.product_unchecked else check_product(product)
                self.stats.crossings += 1
                del self._in_flight[request_id]
                return
        self._receive_other(connection, connection.parsed(data), deadline)

    def _receive_other(self, connection: ClientConnection, header: Header, deadline: Deadline) -> None:
        """Take a reply that is no product that is awaited."""
        if header.type is MessageType.ERROR and header.request_id == 0:
            raise connection.refusal(header, deadline)
        request = self._in_flight.get(header.request_id)
        if request is None:
            raise MalformedMessage(f"{header.type.name} came for a request that is not in flight")
        if header.type is MessageType.PRODUCT:
            raise request.other_product(header)
        if header.type is MessageType.DONE:
            request.acknowledged(header)
        elif header.type is MessageType.ERROR:
            self._refused(request, connection.refusal(header, deadline))
        else:
            raise MalformedMessage(f"{header.type.name} came, which does not answer MULTIPLY")
        del self._in_flight[header.request_id]

    def _refused(self, request: Request, refusal: WireError) -> None:
        """The worker answered with an error: what it lacks is sent; anything else is final for this request.

        Raises:
            ProtocolError: it says that the request broke the protocol.
        """
        if not isinstance(refusal, Refused):
            raise refusal
        error, matrix = refusal.error, self.matrices.get(request.needs)
        request.times_unknown += 1
        if isinstance(error, UnknownMatrix) and matrix is not None and request.times_unknown <= self._retry.attempts:
            self.missing[matrix.matrix_id] = matrix
            self.waiting.insert(0, request)
        else:
            request.error = error

    def _upload(self, connection: ClientConnection, matrix: StoredMatrix) -> None:
        """Have the worker hold a matrix; where it will not, what waited for that matrix has failed."""
        try:
            self._uploads.upload(connection, matrix)
        except Refused as refused:
            matrix.refused = (
                refused.error
            )  # not with a traceback: it would keep the matrix, and its place in the allocator
            self._fail([request for request in self.waiting if request.needs == matrix.matrix_id], refused.error)
        del self.missing[matrix.matrix_id]

    def _fail(self, requests: list[Request], error: WireError) -> None:
        for request in list(requests):
            request.error = error
            self.waiting.remove(request)

    def _next_id(self) -> int:
        """Never the same twice in the life of a link."""
        self._last_id += 1
        return self._last_id
