"""An authority signs the certificates of its workers, and of nobody else; what is not one of them is refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.protocol.authority import check_issued, issue, load_authority, load_one, make_authority, make_request
from obfuscatune.protocol.certificates import make_identity
from obfuscatune.protocol.endpoints import connect, parse_address
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.tls import PinnedTls
from obfuscatune.protocol.transport import Deadline
from tests.protocol.peers import TEN_SECONDS, Accepting, echo, identity, make_identities

AUTHORITY, AUTHORITY_KEY = make_authority("cloud-a")
ISSUER = load_authority(AUTHORITY)
SERVES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def self_signed(key: Any) -> bytes:
    return signed_by(key, key.public_key(), issuer="worker").public_bytes(Encoding.PEM)


def signed_by(
    key: Any,
    public: Any,
    *,
    issuer: str = "cloud-a",
    ca: bool = False,
    uses: x509.ExtendedKeyUsage | None = SERVES,
    extra: x509.ExtensionType | None = None,
    days: tuple[int, int] = (-1, 1),
) -> x509.Certificate:
    """A certificate as a careless or hostile authority might sign it."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name("worker"))
        .issuer_name(name(issuer))
        .public_key(public)
        .serial_number(1)
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if uses is not None:
        builder = builder.add_extension(uses, critical=False)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return builder.sign(key, None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256())


def test_a_worker_whose_certificate_was_issued_is_accepted() -> None:
    certificate = load_one(issue(make_request("anything")[0], "cloud-a worker 7", AUTHORITY, AUTHORITY_KEY))
    check_issued(certificate, ISSUER)
    assert certificate.subject == name("cloud-a worker 7")  # and not what the worker says of itself


def ca_key() -> Any:
    return load_pem_private_key(AUTHORITY_KEY, None)


def fresh() -> Any:
    return Ed25519PrivateKey.generate()


@pytest.mark.parametrize(
    "make",
    [
        lambda: load_one(make_identity("worker")[0]),
        lambda: load_one(issue(make_request("w")[0], "w", *make_authority("cloud-a"))),  # of the same name
        lambda: load_one(issue(make_request("w")[0], "w", *make_authority("cloud-b"))),
        lambda: ISSUER,
        lambda: signed_by(ca_key(), fresh().public_key(), ca=True),
        lambda: signed_by(ca_key(), fresh().public_key(), uses=None),
        lambda: signed_by(
            ca_key(), fresh().public_key(), uses=x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        ),
        lambda: signed_by(ca_key(), fresh().public_key(), extra=x509.SubjectAlternativeName([x509.DNSName("x")])),
        lambda: signed_by(ca_key(), fresh().public_key(), days=(-2, -1)),
        lambda: signed_by(ca_key(), fresh().public_key(), days=(1, 2)),
        lambda: signed_by(ca_key(), fresh().public_key(), issuer="cloud-b"),
        lambda: signed_by(ec.generate_private_key(ec.SECP256R1()), fresh().public_key()),
    ],
)
def test_any_other_certificate_is_refused(make: Any) -> None:
    check_issued(signed_by(ca_key(), fresh().public_key()), ISSUER)
    with pytest.raises(UntrustedPeer):
        check_issued(make(), ISSUER)


def test_a_request_that_its_key_did_not_sign_is_refused() -> None:
    mine, others = (x509.load_pem_x509_csr(make_request("w")[0]) for _ in range(2))
    der = mine.public_bytes(Encoding.DER).replace(
        mine.public_key().public_bytes_raw(), others.public_key().public_bytes_raw()
    )
    with pytest.raises(ConfigError):
        issue(x509.load_der_x509_csr(der).public_bytes(Encoding.PEM), "w", AUTHORITY, AUTHORITY_KEY)


@pytest.mark.parametrize("pem", [b"", b"x" * 10_000, AUTHORITY, make_identity("w")[0]])
def test_what_is_no_request_is_refused(pem: bytes) -> None:
    with pytest.raises(ConfigError):
        issue(pem, "w", AUTHORITY, AUTHORITY_KEY)


def test_the_authority_does_not_serve() -> None:
    csr = x509.CertificateSigningRequestBuilder().subject_name(name("w")).sign(ca_key(), None)
    with pytest.raises(ConfigError, match="own key"):
        issue(csr.public_bytes(Encoding.PEM), "w", AUTHORITY, AUTHORITY_KEY)


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        make_identity("w")[0],
        AUTHORITY + AUTHORITY,
        self_signed(ec.generate_private_key(ec.SECP256R1())),
        issue(make_request("w")[0], "w", AUTHORITY, AUTHORITY_KEY),  # a worker signs nobody
    ],
)
def test_what_is_no_authority_is_refused(pem: bytes) -> None:
    with pytest.raises(ConfigError):
        load_authority(pem)


def test_a_key_of_another_authority_signs_nothing() -> None:
    with pytest.raises(ConfigError):
        issue(make_request("w")[0], "w", AUTHORITY, make_authority("cloud-a")[1])


def test_an_issued_certificate_is_pinned_as_any_other(tmp_path: Path) -> None:
    make_identities(tmp_path)
    for who in ("issued", "other"):
        request, key = make_request(who)
        (tmp_path / f"{who}.cert").write_bytes(issue(request, who, AUTHORITY, AUTHORITY_KEY))
        write_new(tmp_path / f"{who}.key", key)
    for pinned, accepted in (("issued", True), ("other", False)):
        listener = Listener(
            parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(tmp_path, "issued", "enclave"), server=True)
        )
        accepting = Accepting(listener)
        tls = PinnedTls(identity(tmp_path, "enclave", pinned), server=False)
        if accepted:
            transport = connect(listener.address, Deadline(TEN_SECONDS), tls)
            echo(transport)
            transport.close()
            assert accepting.finish() is None
        else:
            with pytest.raises(UntrustedPeer):
                connect(listener.address, Deadline(TEN_SECONDS), tls)
            assert accepting.finish() is not None
