"""A bundle's key, and what is derived of it (docs/spec/bundle.md, section 2)."""

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import ConfigError
from obfuscatune.secret_memory import SecretBytes, secret_view

KEY_BYTES = 32
TAG_BYTES = 16
_LABEL = b"obfuscatune/bundle/v1/"


class BundleKey:
    """The key of one bundle, or of several: each has an id of its own, which every derived key depends on."""

    __slots__ = ("secret",)

    def __init__(self, secret: SecretBytes) -> None:
        """Raises ConfigError: it is not of 32 bytes."""
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"a bundle's key has {KEY_BYTES} bytes, not {len(secret)}")
        self.secret = secret
        """As it is released to an enclave."""

    @classmethod
    def generate(cls) -> "BundleKey":
        """A fresh one."""
        return cls(SecretBytes.random(KEY_BYTES))

    def close(self) -> None:
        """Zero it."""
        self.secret.close()

    def commitment(self, bundle_id: bytes) -> bytes:
        """32 bytes that tell nothing of the key, and that no other key has for this bundle."""
        with self._derive(bundle_id, b"commitment") as derived, derived.view as view:
            return bytes(view)

    def manifest_cipher(self, bundle_id: bytes) -> AESGCM:
        """What encrypts the manifest, once."""
        return self._cipher(bundle_id, b"manifest")

    def file_cipher(self, bundle_id: bytes, file_index: int) -> AESGCM:
        """What encrypts the chunks of one file. May be used by several threads."""
        return self._cipher(bundle_id, b"file" + file_index.to_bytes(4, "big"))

    def _cipher(self, bundle_id: bytes, info: bytes) -> AESGCM:
        with self._derive(bundle_id, info) as derived, derived.view as view:
            return AESGCM(view)

    def _derive(self, bundle_id: bytes, info: bytes) -> SecretBytes:
        return derive(self.secret, salt=bundle_id, info=_LABEL + info, length=KEY_BYTES)

    def __repr__(self) -> str:
        return "BundleKey(redacted)"


def derive(key: "bytes | SecretBytes", *, salt: bytes, info: bytes, length: int) -> SecretBytes:
    """HKDF-SHA-256 (RFC 5869), written into memory of its own."""
    derived = SecretBytes.zeros(length)
    with derived.writable() as room, secret_view(key) as view:
        HKDF(SHA256(), length, salt, info).derive_into(view, room)
    return derived
