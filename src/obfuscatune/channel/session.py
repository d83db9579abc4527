"""TLS 1.3 over a socket, both sides with a certificate of any key, and messages over it. Every wait has its deadline.

Which key the peer has is proved by TLS; what it may do, evidence and terms decide. pyOpenSSL, since the standard
library has no exporter (RFC 8446, section 7.5). One thread at a time uses a session; `cut` may come from another.
"""

import contextlib
import math
import select
import socket
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL

from obfuscatune.channel.callbacks import PROTOCOL, ask_for_any_certificate, speak_our_protocol
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import HEADER_BYTES, MessageType, parse_error, parse_header
from obfuscatune.errors import ChannelError, ConnectionLost, WireError
from obfuscatune.protocol.certificates import key_digest
from obfuscatune.protocol.limits import LINGER_SECONDS
from obfuscatune.protocol.sockets import Deadline

EXPORTER_LABEL = b"EXPERIMENTAL obfuscatune attest v1"
"""RFC 5705, section 4: labels that begin with EXPERIMENTAL need no registration."""
_EXPORTER_BYTES = 32
_CHUNK_BYTES = 16 * 1024


class SessionStopped(ConnectionLost):
    """We were told to stop while we waited for the peer."""


def tls_context(identity: Identity, *, server: bool) -> SSL.Context:
    """TLS 1.3 and nothing older, no tickets, a certificate of either side, and our own name for the protocol."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)  # no resumption: each session shows both certificates
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.key)
    # Any certificate will do: none is signed by an authority, and the key alone says who it is.
    ask_for_any_certificate(context)
    speak_our_protocol(context, server=server)
    return context


class Session:
    """One connection. `handshake` comes first; then messages; `end` at last, whatever happened.

    Args:
        sock: connected; the session's from now on.
        stop: when it is readable, waiting for the peer ends with `SessionStopped`.
    """

    def __init__(
        self, sock: socket.socket, context: SSL.Context, *, server: bool, stop: socket.socket | None = None
    ) -> None:
        sock.setblocking(False)
        self._sock, self._stop = sock, stop
        self._tls = SSL.Connection(context, sock)
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
        self._certificate: x509.Certificate | None = None
        self._established = False

    def handshake(self, deadline: Deadline) -> None:
        """Raises ChannelError: no TLS 1.3, no certificate, or another protocol. ConnectionLost, DeadlineExceeded."""
        self._wait(self._tls.do_handshake, (), deadline)
        if self._tls.get_alpn_proto_negotiated() != PROTOCOL:
            raise ChannelError(f"the peer does not speak {PROTOCOL.decode()}")
        certificate = self._tls.get_peer_certificate(as_cryptography=True)
        if certificate is None:
            raise ChannelError("the peer shows no certificate")
        try:
            self.peer_key = key_digest(certificate)
            """SHA-256 of the peer's public key."""
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ChannelError("the key of the peer's certificate cannot be read") from error
        self._certificate = certificate
        self._established = True

    @property
    def peer_certificate(self) -> bytes:
        """What the peer showed, PEM."""
        if self._certificate is None:
            raise ChannelError("no handshake yet")
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def exporter(self, nonce: bytes) -> bytes:
        """A value that both ends of this very TLS session have, and nobody in between."""
        return bytes(self._tls.export_keying_material(EXPORTER_LABEL, _EXPORTER_BYTES, nonce))

    def send(self, message: bytes, deadline: Deadline) -> None:
        """Raises ConnectionLost, DeadlineExceeded, ChannelError: TLS failed."""
        view = memoryview(message)
        while view:
            count = self._wait(self._tls.send, (view[:_CHUNK_BYTES],), deadline)
            view = view[count:]

    def receive(self, expected: MessageType, deadline: Deadline) -> bytes:
        """The body of the next message.

        Raises:
            ChannelError: it is no message, out of turn, too long, or the peer's ERROR.
            ConnectionLost, DeadlineExceeded: it did not come whole.
        """
        header = self._take(HEADER_BYTES, deadline)
        kind, length = parse_header(header, frozenset({expected, MessageType.ERROR}))
        body = self._take(length, deadline)
        if kind is MessageType.ERROR:
            code, text = parse_error(body)
            raise ChannelError(f"the other side ended the session ({code}): {text}")
        return body

    def end(self, message: bytes = b"") -> None:
        """Send last words where they go without much waiting, and close."""
        with contextlib.suppress(WireError, OSError, SSL.Error):
            if self._established:
                if message:
                    self.send(message, Deadline(LINGER_SECONDS))
                self._tls.shutdown()
        self.close()

    def cut(self) -> None:
        """End both directions at once: whoever waits in another thread is told. Only `close` frees the socket."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket up. Twice is once."""
        self._sock.close()

    def _take(self, size: int, deadline: Deadline) -> bytes:
        parts = []
        while size:
            part = self._wait(self._tls.recv, (min(size, _CHUNK_BYTES),), deadline)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, call: Any, arguments: tuple[Any, ...], deadline: Deadline) -> Any:
        """Call, again and again as the socket is ready, until it is done."""
        while True:
            try:
                return call(*arguments)
            except SSL.WantReadError:
                self._poll(select.POLLIN, deadline)
            except SSL.WantWriteError:
                self._poll(select.POLLOUT, deadline)
            except SSL.ZeroReturnError:
                raise ConnectionLost("the peer closed the session") from None
            except SSL.SysCallError as error:
                raise ConnectionLost(f"lost the connection: {error.args[-1]}") from None
            except SSL.Error as error:
                raise ChannelError(f"TLS 1.3 failed with the peer: {_reason(error)}") from None
            except OSError as error:
                raise ConnectionLost(f"lost the connection: {error.strerror or error}") from error

    def _poll(self, events: int, deadline: Deadline) -> None:
        poll = select.poll()
        stop = self._stop if events == select.POLLIN else None
        try:
            poll.register(self._sock, events)
            if stop is not None:
                poll.register(stop, select.POLLIN)
        except ValueError as error:
            raise ConnectionLost("the session is closed") from error
        seconds = deadline.remaining()
        ready = {descriptor for descriptor, _ in poll.poll(None if seconds is None else math.ceil(seconds * 1000))}
        if stop is not None and stop.fileno() in ready:
            raise SessionStopped("stopped")


def _reason(error: SSL.Error) -> str:
    """The last line of OpenSSL's errors, as (library, function, reason)."""
    try:
        return str(error.args[0][-1][-1])[:200]
    except (IndexError, TypeError):
        return "an error without a reason"
