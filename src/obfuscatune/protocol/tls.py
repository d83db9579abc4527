"""TLS 1.3 with certificates pinned on both sides. No authority: each side knows the other's certificate beforehand.

Two checks, either of which would do. OpenSSL verifies the chain with the pinned certificates as its only trust
anchors; and after the handshake the SHA-256 of the peer's public key is compared with theirs, so that a pinned
certificate that could sign others gains nothing by it.

`TlsTransport` may be read by one thread while another writes. OpenSSL forbids two threads in one connection at a time,
and Python does not keep them apart. So each call into it is short (the socket never blocks) and made under a lock; the
waiting is done outside of it.
"""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from obfuscatune.errors import ConfigError, ConnectionLost, UntrustedPeer, WireError
from obfuscatune.protocol.certificates import fingerprint as fingerprint
from obfuscatune.protocol.certificates import key_digest
from obfuscatune.protocol.certificates import make_identity as make_identity
from obfuscatune.protocol.files import read_secret, read_trusted
from obfuscatune.protocol.limits import CHUNK_BYTES, KIB, LINGER_SECONDS
from obfuscatune.protocol.messages import (
    MAGIC,
    TLS_STARTS,
    ErrorCode,
    Header,
    MessageType,
    what_it_speaks,
    what_it_spoke,
)
from obfuscatune.protocol.transport import Buffer, Deadline, SocketTransport, WouldBlock


@dataclass(frozen=True)
class TlsConfig:
    """Who we are, and whom we speak to. All three are PEM files."""

    certificate: Path
    """Ours. The other side pins it."""
    private_key: Path
    """Belonging to `certificate`; not encrypted, readable by us alone (`secret_files.read_secret` says who else)."""
    peers: Path | bytes
    """The certificate of the other side; several, one after the other, where several may be there. A file, or what it
    would hold."""

    @classmethod
    def from_options(cls, tls_cert: Path | None, tls_key: Path | None, peer: Path | None) -> "TlsConfig | None":
        """What the command line says; None where it says nothing of TLS.

        Raises:
            ConfigError: only one or two of the three are given.
        """
        if tls_cert is None and tls_key is None and peer is None:
            return None
        if tls_cert is None or tls_key is None or peer is None:
            raise ConfigError("TLS takes --tls-cert, --tls-key and --peer, all three")
        return cls(tls_cert, tls_key, peer)

    def peers_pem(self) -> bytes:
        """The certificates of the other side.

        Raises:
            ConfigError: others may have written the file.
            OSError: it cannot be read.
        """
        return self.peers if isinstance(self.peers, bytes) else read_trusted(self.peers, "peer certificate")

    @property
    def named_peers(self) -> str:
        """How an error calls them."""
        return "the peer's certificate" if isinstance(self.peers, bytes) else f"the peer certificate {self.peers}"


class PinnedTls:
    """The files of a `TlsConfig`, read and checked once."""

    def __init__(self, config: TlsConfig, *, server: bool) -> None:
        """Raises ConfigError: a file is missing, unreadable, or not what it should be, or others can read the key."""
        try:
            read_secret(config.private_key, "private key")  # to check it: OpenSSL reads it by its name
            pem = config.peers_pem()
            peers = x509.load_pem_x509_certificates(pem)
            self._pins = frozenset(key_digest(peer) for peer in peers)
            self._context = _context(config, pem.decode("ascii"), server=server)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"cannot use TLS with {config.certificate}, {config.private_key} and {config.named_peers}: {error}; "
                "make a pair by `obfuscatune keygen`"
            ) from error
        if key_digest(x509.load_pem_x509_certificate(config.certificate.read_bytes())) in self._pins:
            raise ConfigError(
                f"{config.named_peers} is our own certificate ({config.certificate}): name that of the other side"
            )
        self.is_server = server

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """TLS around a connected socket; the handshake is still to be done."""
        return self._context.wrap_socket(sock, server_side=self.is_server, do_handshake_on_connect=False)

    def check(self, sock: ssl.SSLSocket) -> str:
        """After the handshake: hold the peer's public key against the pins.

        Returns:
            The SHA-256 of that key, in hex.

        Raises:
            UntrustedPeer: it is none of them.
        """
        der = sock.getpeercert(binary_form=True)
        if der is None or (pin := key_digest(x509.load_der_x509_certificate(der))) not in self._pins:
            raise UntrustedPeer("the peer's certificate is not one of those pinned here: --peer names others")
        return pin.hex()

    @property
    def peers(self) -> int:
        """How many are pinned."""
        return len(self._pins)


def pins(config: TlsConfig) -> frozenset[str]:
    """The SHA-256 of the public keys that are pinned, in hex.

    Raises:
        ConfigError: the file of the peers is missing or not what it should be.
    """
    try:
        peers = x509.load_pem_x509_certificates(config.peers_pem())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {config.named_peers}: {error}") from error
    return frozenset(key_digest(peer).hex() for peer in peers)


def _context(config: TlsConfig, peers_pem: str, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is pinned; where it listens may change
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the pinned certificate itself is the anchor
    if server:
        context.num_tickets = 0  # no resumption: every connection shows its certificate
    context.load_verify_locations(cadata=peers_pem)
    context.load_cert_chain(config.certificate, config.private_key)
    return context


RECORD_BYTES = 16 * KIB
"""Most plain bytes in one TLS record (RFC 8446, section 5.1)."""
_NO_RECORD = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"}
"""OpenSSL's reasons where what came is no TLS record."""


class TlsTransport(SocketTransport):
    """TLS 1.3 over a connected TCP socket. `establish` comes first."""

    def __init__(self, sock: socket.socket, peer: str, tls: PinnedTls) -> None:
        self._tls_sock = tls.wrap(sock)
        super().__init__(self._tls_sock, peer)
        self._tls_sock.setblocking(False)
        self._tls = tls
        self._lock = threading.Lock()
        self._peer_id = "not known yet"
        self._first = b""

    @property
    def peer_id(self) -> str:
        """See `SocketTransport.peer_id`: its key."""
        return self._peer_id

    def establish(self, deadline: Deadline) -> None:
        """Handshake, and check of the pin.

        Raises:
            UntrustedPeer: the peer is not the one that is pinned, or does not take us for the one it pinned, or
                speaks no TLS.
            ConnectionLost, DeadlineExceeded: it went away, or does not answer.
        """
        try:
            self._wait(self._handshake, None, deadline)
            self._peer_id = f"key {self._tls.check(self._tls_sock)}"
        except UntrustedPeer:
            self._linger()
            raise

    def has_news(self, seconds: float = 0.0) -> bool:
        """See `Transport.has_news`: also what OpenSSL has decrypted already."""
        with self._lock:
            is_there = self._tls_sock.pending() > 0
        return is_there or super().has_news(seconds)

    def _receive(self, view: memoryview, deadline: Deadline) -> int:
        """See `SocketTransport`; here it waits before it reads, for to read in vain takes longer."""
        with self._lock:
            is_there = self._tls_sock.pending()
        if not is_there:
            self._wait_until(select.POLLIN, deadline.remaining())
        return self._wait(self._read, view, deadline)

    def _handshake(self, _: None) -> int:
        self._look_at_the_first_bytes()
        try:
            self._tls_sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise _would_block(error) from None
        except ssl.SSLEOFError as error:
            raise ConnectionLost(f"{self._peer} closed the connection during the TLS handshake") from error
        except ssl.SSLCertVerificationError as error:
            raise UntrustedPeer(
                f"{self._peer} shows a certificate that is not pinned here ({_reason(error)}): our --peer must be its "
                "--tls-cert; compare the fingerprints that keygen printed"
            ) from error
        except ssl.SSLError as error:
            if error.reason in _NO_RECORD and not self._first.startswith(TLS_STARTS):
                spoken = what_it_speaks(self._first) if self._first else what_it_spoke(self._peek() or b"")
                raise UntrustedPeer(f"no TLS with {self._peer}: {spoken}") from error
            raise UntrustedPeer(
                f"no TLS 1.3 with {self._peer}: {_reason(error)}; compare the certificates pinned "
                "(--peer on each side is --tls-cert of the other)"
            ) from error
        return 0

    def _look_at_the_first_bytes(self) -> None:
        """Before OpenSSL takes them: of a peer that speaks no TLS it would not say what it speaks.

        A server waits for them. A client has to speak first, and what it sees then may come after bytes that OpenSSL
        has taken already: it looks, and says nothing before OpenSSL finds no TLS there.

        Raises:
            UntrustedPeer: a client speaks no TLS. One that speaks our protocol is told so, without TLS.
            WouldBlock: a client said nothing yet.
        """
        if self._first:
            return
        first = self._peek()
        if first is None and self._tls.is_server:
            raise WouldBlock(select.POLLIN)
        self._first = first or b""
        if self._tls.is_server and self._first and not self._first.startswith(TLS_STARTS):
            if self._first.startswith(MAGIC):
                self._refuse_in_clear()
            raise UntrustedPeer(f"no TLS with {self._peer}: {what_it_speaks(self._first)}")

    def _peek(self) -> bytes | None:
        """What has come and is not taken yet, without TLS: None where nothing has, nothing where the peer closed."""
        try:
            return socket.socket.recv(self._tls_sock, KIB, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _refuse_in_clear(self) -> None:
        """Answer an enclave that speaks without TLS."""
        body = b"this worker speaks by TLS: give --tls-cert, --tls-key and --peer on both sides, or on neither"
        header = Header(MessageType.ERROR, payload_bytes=len(body), code=ErrorCode.FAILED)
        with contextlib.suppress(OSError):
            socket.socket.send(self._tls_sock, header.pack() + body, socket.MSG_DONTWAIT)

    def _linger(self) -> None:
        """Throw away what still comes, for a moment, until the peer closes: to close would take our last words from it.

        What comes is not decrypted: `Transport.recv_into` is for what does.
        """
        if not self._tls.is_server:
            return
        with contextlib.suppress(WireError):
            self.stop_sending()
            deadline = Deadline(LINGER_SECONDS)
            while self._wait(self._read_raw, CHUNK_BYTES, deadline):
                pass

    def _read_raw(self, size: int) -> int:
        try:
            return len(socket.socket.recv(self._tls_sock, size, socket.MSG_DONTWAIT))
        except BlockingIOError:
            raise WouldBlock(select.POLLIN) from None

    def _write(self, buffers: Sequence[Buffer]) -> int:
        """Records of 16 KiB each until the socket is full or a chunk is sent."""
        sent = 0
        try:
            with self._lock:
                for view in _joined(buffers):
                    done = 0
                    while done < len(view):
                        count = self._tls_sock.send(view[done:])
                        done += count
                        sent += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            if not sent:
                raise _would_block(error) from None
        return sent

    def _read(self, view: memoryview) -> int:
        """Records of 16 KiB each until one is smaller, the socket is empty or the view is full. Raises WouldBlock."""
        came = 0
        try:
            with self._lock:
                while came < len(view):
                    count = self._tls_sock.recv_into(view[came:])
                    came += count
                    if count < RECORD_BYTES:
                        break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            if not came:
                raise _would_block(error) from None
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):  # TLS 1.3: the peer checks our certificate after our handshake is done
                raise UntrustedPeer(
                    f"{self._peer} refused our certificate: {_reason(error)}; its --peer must be our --tls-cert"
                ) from error
            raise
        return came


def _joined(buffers: Sequence[Buffer]) -> list[memoryview]:
    """A header and the first bytes of its payload together; then the rest of one chunk."""
    first, *others = [memoryview(buffer) for buffer in buffers]
    if not others:
        return [first[:CHUNK_BYTES]]
    room = max(0, RECORD_BYTES - len(first))
    return [memoryview(b"".join((first, others[0][:room]))), others[0][room:CHUNK_BYTES]]


def _would_block(error: ssl.SSLError) -> WouldBlock:
    return WouldBlock(select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT)


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
