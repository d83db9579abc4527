"""HELLO and WELCOME: who is there, and what it may send."""

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import LimitExceeded, ProtocolError, UnsupportedVersion, WireError, WorkerRefused
from obfuscatune.wire.framing import recv_body, recv_header
from obfuscatune.wire.limits import MAX_IN_FLIGHT, MAX_MATRIX_BYTES, MAX_WINDOW_BYTES, VERSION
from obfuscatune.wire.messages import ErrorCode, Header, MessageType
from obfuscatune.wire.payloads import Hello, Welcome
from obfuscatune.wire.transport import Transport
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.replies import Reply, refusal
from obfuscatune.worker.sessions import session_key

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
