"""TLS 1.3 with certificates pinned on both sides. No authority: each side knows the other's certificate beforehand.

Two checks, either of which would do. OpenSSL verifies the chain with the pinned certificates as its only trust
anchors; and after the handshake the SHA-256 of the peer's public key is compared with theirs, so that a pinned
certificate that could sign others gains nothing by it.
"""

import datetime
import hashlib
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from obfuscatune.wire.errors import ConfigError, UntrustedPeer
from obfuscatune.wire.secret_files import read_secret, read_trusted

VALID_DAYS = 3650
"""Of a certificate made here. What ends its use is that its pin is removed, not a date."""


@dataclass(frozen=True)
class TlsConfig:
    """Who we are, and whom we speak to. All three are PEM files."""

    certificate: Path
    """Ours. The other side pins it."""
    private_key: Path
    """Belonging to `certificate`; not encrypted, readable by us alone (`secret_files.read_secret` says who else)."""
    peers: Path
    """The certificate of the other side; several, one after the other, where several may be there."""

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


class PinnedTls:
    """The files of a `TlsConfig`, read and checked once."""

    def __init__(self, config: TlsConfig, *, server: bool) -> None:
        """Raises ConfigError: a file is missing, unreadable, or not what it should be, or others can read the key."""
        try:
            read_secret(config.private_key, "private key")  # to check it: OpenSSL reads it by its name
            pem = read_trusted(config.peers, "peer certificate")
            peers = x509.load_pem_x509_certificates(pem)
            self._pins = frozenset(_pin(peer) for peer in peers)
            self._context = _context(config, pem.decode("ascii"), server=server)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                f"cannot use TLS with {config.certificate}, {config.private_key} and the peer {config.peers}: {error}; "
                "make a pair by `obfuscatune keygen`"
            ) from error
        if _pin(x509.load_pem_x509_certificate(config.certificate.read_bytes())) in self._pins:
            raise ConfigError(
                f"--peer {config.peers} names our own certificate ({config.certificate}): name that of the other side"
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
        if der is None or (pin := _pin(x509.load_der_x509_certificate(der))) not in self._pins:
            raise UntrustedPeer("the peer's certificate is not one of those pinned here: --peer names others")
        return pin.hex()

    @property
    def peers(self) -> int:
        """How many are pinned."""
        return len(self._pins)


def make_identity(name: str) -> tuple[bytes, bytes]:
    """A fresh self-signed certificate and its private key (EC P-256), both PEM. `name` is for people to read."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # the other side's clock may be behind ours
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of the certificate's public key (SubjectPublicKeyInfo), in hex: what two people compare by telephone."""
    return _pin(x509.load_pem_x509_certificate(certificate_pem)).hex()


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


def _pin(certificate: x509.Certificate) -> bytes:
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).digest()
