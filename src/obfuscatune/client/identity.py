"""A party's keys: the directory that `obfuscatune keygen` makes, read once."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.files import read_secret, read_trusted

CERTIFICATE, PRIVATE_KEY = "cert.pem", "key.pem"
_OWNER_KEY = b"obfuscatune/owner-key/v1"


@dataclass(frozen=True)
class Identity:
    """Who a party is: a self-signed certificate, known by the SHA-256 of its public key, and the private key to it."""

    directory: Path
    certificate_pem: bytes
    spki_sha256: str
    """Of the certificate's SubjectPublicKeyInfo, in hex: what a grant names."""
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def from_directory(cls, directory: Path) -> "Identity":
        """Read `cert.pem` and `key.pem`.

        Raises:
            ConfigError: one is missing, not what it should be, or readable by others; or they do not belong together.
        """
        try:
            pem = read_trusted(directory / CERTIFICATE, "certificate")
            key = serialization.load_pem_private_key(read_secret(directory / PRIVATE_KEY, "private key"), None)
            public = x509.load_pem_x509_certificate(pem).public_key()
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{directory} is no identity: {error}; make one by `obfuscatune keygen --out {directory}`"
            ) from error
        spki = _spki(public)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or _spki(key.public_key()) != spki:
            raise ConfigError(f"{directory}: {PRIVATE_KEY} is not the key of {CERTIFICATE}")
        return cls(directory, pem, hashlib.sha256(spki).hexdigest(), key)

    @property
    def certificate_file(self) -> Path:
        """`cert.pem`, which libraries read by its name."""
        return self.directory / CERTIFICATE

    @property
    def key_file(self) -> Path:
        """`key.pem`, which libraries read by its name."""
        return self.directory / PRIVATE_KEY

    def owner_key(self) -> bytes:
        """The key K_o under which a service keeps what is this owner's, 32 bytes: HKDF-SHA256 of the private key.

        Whoever has the identity has it; whoever loses the identity loses what lies under it.
        """
        secret = self._key.private_numbers().private_value.to_bytes(32, "big")
        return HKDF(hashes.SHA256(), 32, salt=None, info=_OWNER_KEY).derive(secret)


def _spki(public: object) -> bytes:
    return public.public_bytes(  # type: ignore[attr-defined, no-any-return]  # any public key of cryptography's
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
