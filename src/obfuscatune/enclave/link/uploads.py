"""What a worker is to hold and to forget: requests that have the connection to themselves."""

from collections.abc import Callable

from obfuscatune.enclave.link.connection import LinkConnection
from obfuscatune.enclave.link.pending import StoredMatrix
from obfuscatune.enclave.link.stats import LinkStats
from obfuscatune.wire.deadline import Deadline, transfer_seconds
from obfuscatune.wire.messages import NO_DIGEST, NO_MATRIX, Header, MessageType
from obfuscatune.wire.payloads import pack_number
from obfuscatune.wire.tensors import bytes_of, content_digest
from obfuscatune.wire.transport import Buffer

FAREWELL_SECONDS = 5.0
"""How long `forget_all` waits for the worker to confirm that it has forgotten everything."""
_ANSWERS = {
    MessageType.OFFER: {MessageType.HAVE, MessageType.WANT},
    MessageType.STORE: {MessageType.STORED},
    MessageType.FORGET: {MessageType.DONE},
}


class Uploads:
    """Asks for one thing at a time, and waits. Everything here raises as `LinkConnection.exchange` does."""

    def __init__(self, stats: LinkStats, next_id: Callable[[], int], deadline_s: float) -> None:
        self._stats, self._next_id, self._deadline_s = stats, next_id, deadline_s

    def upload(self, connection: LinkConnection, matrix: StoredMatrix) -> None:
        """Offer a matrix, and send it if the worker has not got it."""
        if connection.wants_digests and matrix.digest == NO_DIGEST:
            matrix.digest = content_digest(matrix.elements())
        if self._ask(connection, matrix.offer(self._next_id()), matrix.digest) is not MessageType.WANT:
            return
        elements = matrix.elements()
        laid = connection.lay_out(elements)
        payload = bytes_of(elements) if laid is None else pack_number(laid.offset)
        self._ask(connection, matrix.store(self._next_id(), shared=laid is not None), payload)
        self._stats.uploads += 1
        self._stats.bytes_uploaded += matrix.nbytes

    def forget(self, connection: LinkConnection, matrix_id: bytes) -> None:
        """Have the worker drop one matrix."""
        self._ask(connection, Header(MessageType.FORGET, self._next_id(), matrix_id))

    def forget_all(self, connection: LinkConnection) -> None:
        """Have the worker drop all of the session."""
        self._ask(connection, Header(MessageType.FORGET, self._next_id(), NO_MATRIX), seconds=FAREWELL_SECONDS)

    def _ask(
        self, connection: LinkConnection, header: Header, payload: Buffer = b"", seconds: float | None = None
    ) -> MessageType:
        deadline = Deadline(seconds or self._deadline_s + transfer_seconds(header.message_bytes))
        return connection.exchange(header, payload, _ANSWERS[header.type], deadline)
