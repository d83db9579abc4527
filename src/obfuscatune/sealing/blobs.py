"""Small secrets at rest: state of a service, sealed under a key that only its owner can release.

    blob = version (1) | salt (32) | AES-256-GCM ciphertext | tag (16)

Key and nonce are HKDF-SHA-256 of the caller's key and of a random salt, fresh for each blob: one key may seal any
number of them. `purpose` and `name` are authenticated, so that no blob stands for another. An older blob of the same
name is not told from the newest one: who needs that keeps the blob's digest, or a counter, elsewhere.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from obfuscatune.errors import IntegrityError
from obfuscatune.sealing.keys import KEY_BYTES, TAG_BYTES, derive
from obfuscatune.secret_memory import SecretBytes

VERSION = b"\x01"
SALT_BYTES = 32
OVERHEAD_BYTES = len(VERSION) + SALT_BYTES + TAG_BYTES
_NONCE_BYTES = 12
_LABEL = b"obfuscatune/blob/v1"


def seal_blob(key: bytes | SecretBytes, data: bytes, *, purpose: str, name: str) -> bytes:
    """Encrypt `data`, which is `OVERHEAD_BYTES` longer then.

    Args:
        key: 32 bytes.
        purpose: what kind of thing it is, "job-column" say.
        name: which one of them.
    """
    return _seal_with_salt(key, data, purpose, name, os.urandom(SALT_BYTES))


def open_blob(key: bytes | SecretBytes, blob: bytes, *, purpose: str, name: str) -> bytes:
    """What `seal_blob` was given under the same key, purpose and name.

    Raises:
        IntegrityError: it was changed, or sealed under another key, purpose or name.
    """
    if len(blob) < OVERHEAD_BYTES or not blob.startswith(VERSION):
        raise IntegrityError(f"no sealed blob of this version: {purpose}")
    salt, sealed = blob[1 : 1 + SALT_BYTES], blob[1 + SALT_BYTES :]
    cipher, nonce = _cipher(key, salt)
    try:
        return cipher.decrypt(nonce, sealed, _associated(purpose, name))
    except InvalidTag:
        raise IntegrityError(f"a sealed blob was changed, or is another's: {purpose}") from None


def _seal_with_salt(key: bytes | SecretBytes, data: bytes, purpose: str, name: str, salt: bytes) -> bytes:
    cipher, nonce = _cipher(key, salt)
    return VERSION + salt + cipher.encrypt(nonce, data, _associated(purpose, name))


def _cipher(key: bytes | SecretBytes, salt: bytes) -> tuple[AESGCM, bytes]:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    with derive(key, salt=salt, info=_LABEL, length=KEY_BYTES + _NONCE_BYTES) as derived, derived.view as view:
        return AESGCM(view[:KEY_BYTES]), bytes(view[KEY_BYTES:])


def _associated(purpose: str, name: str) -> bytes:
    """Each with its length before it, so that no two pairs look alike."""
    fields = (purpose.encode(), name.encode())
    return _LABEL + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
