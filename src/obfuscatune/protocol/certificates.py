"""Self-signed certificates, which are known by their keys."""

import datetime
import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CERTIFICATE, KEY = "cert.pem", "key.pem"
"""What `obfuscatune keygen` and `fleet authority` call their files."""
VALID_DAYS = 3650
"""Of a certificate made here. What ends its use is that its pin is removed, not a date."""


def make_identity(name: str) -> tuple[bytes, bytes]:
    """A fresh self-signed certificate and its private key (Ed25519), both PEM. `name` is for people to read."""
    key = Ed25519PrivateKey.generate()
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
        .sign(key, None)
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of the certificate's public key (SubjectPublicKeyInfo), in hex: what two people compare by telephone."""
    return key_digest(x509.load_pem_x509_certificate(certificate_pem)).hex()


def key_digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of a certificate's public key (SubjectPublicKeyInfo).

    Raises:
        ValueError, UnsupportedAlgorithm: the key cannot be read.
    """
    return spki_digest(certificate.public_key())


def spki_digest(key: CertificatePublicKeyTypes) -> bytes:
    """SHA-256 of a public key, as SubjectPublicKeyInfo."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()
