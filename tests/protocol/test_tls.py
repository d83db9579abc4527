"""Each side refuses whom it has not pinned, and whoever speaks no TLS 1.3."""

import datetime
import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import ConfigError, ConnectionLost, UntrustedPeer
from obfuscatune.protocol.endpoints import connect, parse_address
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.framing import recv_payload
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.tls import PinnedTls, TlsConfig
from obfuscatune.protocol.transport import Deadline
from tests.protocol.peers import TEN_SECONDS, Accepting, identity, make_identities


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_identities(tmp_path_factory.mktemp("identities"))


def test_we_refuse_a_worker_that_is_not_pinned(identities: Path) -> None:
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "enclave"), server=True)
    )
    accepting = Accepting(listener)
    with pytest.raises(UntrustedPeer):
        connect(
            listener.address,
            Deadline(TEN_SECONDS),
            PinnedTls(identity(identities, "enclave", "stranger"), server=False),
        )
    assert accepting.finish() is not None


def test_the_worker_refuses_an_enclave_that_is_not_pinned(identities: Path) -> None:
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "stranger"), server=True)
    )
    accepting = Accepting(listener)
    transport = connect(
        listener.address, Deadline(TEN_SECONDS), PinnedTls(identity(identities, "enclave", "worker"), server=False)
    )
    try:
        with pytest.raises((UntrustedPeer, ConnectionLost)):
            while transport.recv_into(memoryview(bytearray(1)), Deadline(TEN_SECONDS)) == 0:
                raise ConnectionLost("closed without a word")
    finally:
        transport.close()
        error = accepting.finish()
    assert isinstance(error, UntrustedPeer)


def test_the_worker_refuses_an_enclave_without_a_certificate(identities: Path) -> None:
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "enclave"), server=True)
    )
    accepting = Accepting(listener)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, port = str(listener.address).split(":")[1:]
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as sock:  # noqa: SIM117
        with pytest.raises(ssl.SSLError):  # not earlier: TLS 1.3 finishes its handshake before the worker looks
            sock.recv(1)
    assert isinstance(accepting.finish(), UntrustedPeer)


def test_the_worker_refuses_tls_1_2(identities: Path) -> None:
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "enclave"), server=True)
    )
    accepting = Accepting(listener)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(identities / "worker.cert")
    context.load_cert_chain(identities / "enclave.cert", identities / "enclave.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = str(listener.address).split(":")[1:]
    with socket.create_connection((host, int(port))) as plain, pytest.raises((ssl.SSLError, ConnectionResetError)):
        context.wrap_socket(plain)
    assert isinstance(accepting.finish(), UntrustedPeer)


def test_the_worker_refuses_a_plain_enclave(identities: Path) -> None:
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "enclave"), server=True)
    )
    accepting = Accepting(listener)
    transport = connect(listener.address, Deadline(TEN_SECONDS))
    transport.send([Header(MessageType.HELLO, payload_bytes=36).pack(), bytes(36)], Deadline(TEN_SECONDS))
    assert isinstance(accepting.finish(), UntrustedPeer)
    transport.close()


def test_we_refuse_a_worker_without_tls(identities: Path) -> None:
    listener = Listener(parse_address("tcp:127.0.0.1:0"))
    answering = threading.Thread(target=_answer_in_clear, args=(listener,))
    answering.start()
    with pytest.raises(UntrustedPeer, match="no TLS"):
        connect(
            listener.address, Deadline(TEN_SECONDS), PinnedTls(identity(identities, "enclave", "worker"), server=False)
        )
    answering.join()
    listener.close()


def _answer_in_clear(listener: Listener) -> None:
    transport = listener.accept()
    assert transport is not None
    transport.recv_into(memoryview(bytearray(4096)), Deadline(TEN_SECONDS))
    transport.send([Header(MessageType.WELCOME, payload_bytes=32).pack(), bytes(32)], Deadline(TEN_SECONDS))
    transport.close()


def test_a_pinned_certificate_vouches_for_no_other(identities: Path, tmp_path: Path) -> None:
    """The pinned certificate may sign, and has signed the stranger's: OpenSSL is content, the pin is not."""
    key = ec.generate_private_key(ec.SECP256R1())
    pinned, leaf = _signed(key.public_key(), key, ca=True), _signed((other := _new_key()).public_key(), key, ca=False)
    (tmp_path / "pinned.cert").write_bytes(pinned)
    (tmp_path / "leaf.cert").write_bytes(leaf)
    write_new(
        tmp_path / "leaf.key",
        other.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    signed = TlsConfig(tmp_path / "leaf.cert", tmp_path / "leaf.key", identities / "enclave.cert")
    listener = Listener(parse_address("tcp:127.0.0.1:0"), PinnedTls(signed, server=True))
    accepting = Accepting(listener)
    here = PinnedTls(replace(identity(identities, "enclave", "worker"), peers=tmp_path / "pinned.cert"), server=False)
    with pytest.raises(UntrustedPeer, match="not one of those pinned"):
        connect(listener.address, Deadline(TEN_SECONDS), here)
    accepting.finish()


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _signed(public: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("ca" if ca else "leaf", "ca")]
    builder = x509.CertificateBuilder(
        names[1], names[0], public, x509.random_serial_number(), now, now + datetime.timedelta(1)
    )
    return (
        builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(issuer, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def test_what_is_sent_after_reading_stopped_is_still_encrypted(identities: Path) -> None:
    """`SSLSocket.shutdown` would drop the TLS layer, and go on in clear text."""
    listener = Listener(
        parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(identities, "worker", "enclave"), server=True)
    )
    came: list[bytes] = []

    def receive() -> None:
        transport = connect(
            listener.address, Deadline(TEN_SECONDS), PinnedTls(identity(identities, "enclave", "worker"), server=False)
        )
        data = bytearray(10)
        try:
            recv_payload(transport, memoryview(data), Deadline(TEN_SECONDS))
            came.append(bytes(data))
        finally:
            transport.close()

    thread = threading.Thread(target=receive)
    thread.start()
    transport = listener.accept()
    assert transport is not None
    transport.establish(Deadline(TEN_SECONDS))
    transport.stop_reading()
    transport.send([b"last words"], Deadline(TEN_SECONDS))
    thread.join(TEN_SECONDS)
    transport.close()
    listener.close()
    assert came == [b"last words"]


def test_our_own_certificate_is_no_peer_s(identities: Path) -> None:
    """The usual mistake, and nobody could connect."""
    with pytest.raises(ConfigError, match="our own certificate"):
        PinnedTls(identity(identities, "worker", "worker"), server=True)


@pytest.mark.parametrize("missing", ["certificate", "private_key", "peers"])
def test_tls_files_that_cannot_be_used(missing: str, identities: Path, tmp_path: Path) -> None:
    config = identity(identities, "enclave", "worker")
    with pytest.raises(ConfigError):
        PinnedTls(replace(config, **{missing: tmp_path / "absent"}), server=False)
    write_new(tmp_path / "junk", b"no certificate")
    with pytest.raises(ConfigError):
        PinnedTls(replace(config, **{missing: tmp_path / "junk"}), server=False)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620])
def test_a_private_key_that_others_can_read_is_refused(mode: int, identities: Path, tmp_path: Path) -> None:
    """By either side, as ssh does it."""
    config = identity(identities, "worker", "enclave")
    write_new(tmp_path / "open.key", config.private_key.read_bytes())
    (tmp_path / "open.key").chmod(mode)
    for server in (True, False):
        with pytest.raises(ConfigError, match=r"private key .*open.key is open to others .* chmod 600 .*open.key$"):
            PinnedTls(replace(config, private_key=tmp_path / "open.key"), server=server)
