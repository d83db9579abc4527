"""A party's key and certificate: `cert.pem` and `key.pem`, as `obfuscatune keygen` makes them.

One Ed25519 key does both: it authenticates TLS 1.3, and it signs documents. The messages differ in their first bytes:
64 spaces in TLS (RFC 8446, section 4.4.3), "obfuscatune/" in a document, a DER sequence in the certificate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from obfuscatune import documents
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.certificates import CERTIFICATE, KEY, key_digest, make_identity, spki_digest
from obfuscatune.protocol.files import read_secret, read_trusted


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """Who we are."""

    certificate: x509.Certificate
    key: Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"Identity({self.fingerprint})"

    @classmethod
    def generate(cls, name: str) -> "Identity":
        """A fresh one, in memory alone: an enclave's, for as long as it runs."""
        return cls._from_pem(*make_identity(name), where="a fresh identity")

    @classmethod
    def load(cls, folder: Path) -> "Identity":
        """The one that `obfuscatune keygen --out FOLDER` made.

        Raises:
            ConfigError: a file is missing, not what it should be, or others can read the key.
        """
        try:
            certificate = read_trusted(folder / CERTIFICATE, "certificate")
            return cls._from_pem(certificate, read_secret(folder / KEY, "private key"), where=str(folder))
        except OSError as error:
            raise ConfigError(
                f"cannot read {error.filename}: {error.strerror}; `obfuscatune keygen` makes it"
            ) from error

    @classmethod
    def _from_pem(cls, certificate_pem: bytes, key_pem: bytes, where: str) -> "Identity":
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
            matches = certificate.public_key() == key.public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(f"{where} holds no certificate and private key: make them by `keygen`") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                f"{where} holds a key of another kind than Ed25519, which signs no documents: use `keygen`"
            )
        if not matches:
            raise ConfigError(f"the certificate in {where} is not of the private key beside it")
        return cls(certificate, key)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, in hex: how the others know us."""
        return key_digest(self.certificate).hex()

    @property
    def certificate_pem(self) -> bytes:
        """What others may have."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, document: dict[str, Any], purpose: str) -> dict[str, Any]:
        """The document, signed, as `documents.sign` does."""
        return documents.sign(document, purpose, self.key)


def signer_fingerprint(key: str) -> str:
    """The fingerprint of the party that signs with this Ed25519 key, in hex.

    Raises:
        ValueError: it is no key.
    """
    return spki_digest(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))).hex()
