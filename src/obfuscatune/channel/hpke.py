"""A secret for one attested key in one session: HPKE (RFC 9180), base mode, X25519, HKDF-SHA256, AES-256-GCM.

What is sealed is the encapsulated key (32 bytes), then the ciphertext with its tag (16 bytes).
"""

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from obfuscatune.errors import ChannelError

SECRET_BYTES = 32
"""Every secret that is released is a key of so many."""
SEALED_BYTES = 32 + SECRET_BYTES + 16
_RELEASE_LABEL = b"obfuscatune/release/v1"
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def release_info(kind: str, report_data: bytes, sequence: int, document: bytes) -> bytes:
    """HPKE's `info` for a secret: it opens in this session alone, as this request, with this document.

    Args:
        kind: of the request, "grant" say.
        report_data: the session's, which no other session has (`attest.binding.Binding`).
        sequence: the request's number in the session.
        document: the canonical bytes of what the secret is released with.
    """
    number = sequence.to_bytes(4, "big")
    fields = (_RELEASE_LABEL, kind.encode(), report_data, number, hashlib.sha256(document).digest())
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def seal(secret: bytes, public_key: bytes, info: bytes) -> bytes:
    """Seal a secret to an X25519 public key (32 bytes).

    Raises:
        ChannelError: a secret of another length, or a key that is none.
    """
    if len(secret) != SECRET_BYTES:
        raise ChannelError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    try:
        return _SUITE.encrypt(secret, X25519PublicKey.from_public_bytes(public_key), info)
    except ValueError as error:  # of a wrong length, or a point of small order
        raise ChannelError("the attested key is no X25519 key") from error


def unseal(sealed: bytes, private_key: X25519PrivateKey, info: bytes) -> bytes:
    """Open what `seal` made for this key and this `info`.

    Raises:
        ChannelError: it was sealed for another key or another session, or was changed.
    """
    if len(sealed) != SEALED_BYTES:
        raise ChannelError(f"a sealed secret has {SEALED_BYTES} bytes, not {len(sealed)}")
    try:
        return _SUITE.decrypt(sealed, private_key, info)
    except (InvalidTag, ValueError) as error:
        raise ChannelError("the secret was sealed for another key, session or request, or was changed") from error
