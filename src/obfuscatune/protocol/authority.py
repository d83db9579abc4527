"""An operator's authority: a key that signs the certificates of that operator's workers.

Where workers come and go, nobody can pin each certificate by hand. The enclave pins the authority's key instead, and
takes a worker only if its certificate passes `check_issued`. It then pins that worker's own key for TLS, as it does
for a worker that was named by hand: the authority never takes part in a handshake.

A worker makes its key where it runs and asks for a certificate by a request (PKCS#10), which proves that it holds the
key. No private key travels.
"""

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from obfuscatune.errors import ConfigError, UntrustedPeer
from obfuscatune.protocol.certificates import VALID_DAYS

ISSUED_DAYS = 365
"""Of a worker's certificate. A shorter list of members does not end its use, since whoever serves it may be hostile."""
MAX_PEM_BYTES = 8192
"""Of one certificate or request; those made here have less than 1,024."""
_CLOCK_SKEW = datetime.timedelta(days=1)
_KNOWN_EXTENSIONS = (x509.BasicConstraints, x509.ExtendedKeyUsage, x509.KeyUsage)


def make_authority(name: str) -> tuple[bytes, bytes]:
    """A fresh authority's certificate and its private key (Ed25519), both PEM. `name` is the operator's."""
    key = Ed25519PrivateKey.generate()
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key.public_key(), VALID_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def make_request(name: str) -> tuple[bytes, bytes]:
    """A worker's request for a certificate and its fresh private key (Ed25519), both PEM."""
    key = Ed25519PrivateKey.generate()
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, None)
    return request.public_bytes(serialization.Encoding.PEM), _pem(key)


def issue(request_pem: bytes, name: str, authority_pem: bytes, authority_key_pem: bytes) -> bytes:
    """The certificate that a worker asked for, PEM.

    Args:
        request_pem: Of `make_request`. Only its key is taken: what a worker says of itself is not signed.
        name: Who the worker is, for people to read.
        authority_pem, authority_key_pem: Of `make_authority`.

    Raises:
        ConfigError: the request is not one, or the authority's files do not belong together.
    """
    try:
        if len(request_pem) > MAX_PEM_BYTES:
            raise ValueError(f"{len(request_pem):,} bytes")
        request = x509.load_pem_x509_csr(request_pem)
        public = request.public_key()
        if not isinstance(public, Ed25519PublicKey) or not request.is_signature_valid:
            raise ValueError("no Ed25519 key, or its owner did not sign")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"a worker's request for a certificate cannot be used: {error}") from error
    authority = load_authority(authority_pem)
    try:
        key = serialization.load_pem_private_key(authority_key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError("the authority's private key cannot be read") from None
    if not isinstance(key, Ed25519PrivateKey) or key.public_key() != authority.public_key():
        raise ConfigError("the authority's private key does not belong to its certificate")
    if public == key.public_key():
        raise ConfigError("a worker asks for a certificate of the authority's own key")
    certificate = (
        _builder(_name(name), authority.subject, public, ISSUED_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_authority(pem: bytes) -> x509.Certificate:
    """An authority's certificate.

    Raises:
        ConfigError: it is none: malformed, several, or a certificate that may not sign others.
    """
    try:
        certificate = load_one(pem)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if not constraints.ca or not usage.key_cert_sign:
            raise ValueError("it may not sign others")
        if not isinstance(certificate.public_key(), Ed25519PublicKey):
            raise ValueError("its key is not an Ed25519 key")
    except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise ConfigError(
            f"no certificate of an authority: {error}; `obfuscatune fleet authority` makes one"
        ) from error
    return certificate


def load_one(pem: bytes) -> x509.Certificate:
    """Exactly one certificate, in PEM.

    Raises:
        ValueError: it is none, several, or longer than `MAX_PEM_BYTES`.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise ValueError(f"a certificate of {len(pem):,} bytes; at most {MAX_PEM_BYTES:,} are read")
    certificates = x509.load_pem_x509_certificates(pem)
    if len(certificates) != 1:
        raise ValueError(f"{len(certificates)} certificates where one is expected")
    return certificates[0]


def check_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Check that an authority signed a worker's certificate, and that it is one of a worker, valid today.

    Raises:
        UntrustedPeer: it is not; the message says why.
    """
    try:
        certificate.verify_directly_issued_by(authority)
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        uses = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (InvalidSignature, TypeError):
        raise UntrustedPeer("the certificate is not signed by the operator's authority") from None
    except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise UntrustedPeer(f"the certificate is not one of an authority's workers: {error}") from error
    if constraints.ca or ExtendedKeyUsageOID.SERVER_AUTH not in uses:
        raise UntrustedPeer("the certificate is not one of a worker: it may sign others, or not serve")
    if any(it.critical and not isinstance(it.value, _KNOWN_EXTENSIONS) for it in extensions):
        raise UntrustedPeer("the certificate has a critical extension that is not known here")
    now = datetime.datetime.now(datetime.UTC)
    for who, it in (("worker", certificate), ("authority", authority)):
        if not it.not_valid_before_utc <= now <= it.not_valid_after_utc:
            raise UntrustedPeer(f"the certificate of the {who} is not valid today")


def _builder(subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, valid_days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=valid_days))
    )


def _usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
