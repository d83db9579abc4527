"""What the evidence of one session is bound to, and what a secret released in it is bound to.

Fields are joined with their lengths before them, so that no two lists of fields are the same bytes.
"""

import hashlib
import struct
from dataclasses import dataclass

REPORT_LABEL = b"obfuscatune/attest/v1"
RELEASE_LABEL = b"obfuscatune/release/v1"
EXPORTER_LABEL = b"EXPERIMENTAL obfuscatune attest v1"
"""RFC 5705, section 4: labels that begin with EXPERIMENTAL need no registration."""
EXPORTER_BYTES = 32
NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")


def join_fields(*fields: bytes) -> bytes:
    """Each field with its length before it, as u32, little-endian."""
    return b"".join(_LENGTH.pack(len(field)) + field for field in fields)


@dataclass(frozen=True, slots=True)
class Binding:
    """One session, as both of its ends see it. None of it is secret once the session is over."""

    role: str
    """The attester's."""
    exporter: bytes
    """Of the TLS session, with the verifier's nonce as context."""
    attester_key: bytes
    """SHA-256 of the public key (SubjectPublicKeyInfo) of the attester's certificate."""
    verifier_key: bytes
    nonce: bytes
    """The verifier's, fresh."""

    def report_data(self, claims_digest: bytes) -> bytes:
        """The 64 bytes that the evidence has to carry.

        Args:
            claims_digest: SHA-256 of the canonical claims.
        """
        fields = (REPORT_LABEL, self.role.encode(), self.exporter, self.attester_key, self.verifier_key, self.nonce)
        return hashlib.sha512(join_fields(*fields, claims_digest)).digest()

    def to_document(self) -> dict[str, str]:
        """For the verification document: with the claims, a third person computes the report data of it again."""
        return {
            "role": self.role,
            "exporter": self.exporter.hex(),
            "attester_key": self.attester_key.hex(),
            "verifier_key": self.verifier_key.hex(),
            "nonce": self.nonce.hex(),
        }


def release_info(kind: str, report_data: bytes, sequence: int, document: bytes) -> bytes:
    """HPKE's `info` for a secret: it opens in this session alone, as this request, with this document.

    Args:
        kind: of the request, "grant" say.
        report_data: the session's, which no other session has.
        sequence: the request's number in the session.
        document: the canonical bytes of what the secret is released with.
    """
    number = _LENGTH.pack(sequence)
    return join_fields(RELEASE_LABEL, kind.encode(), report_data, number, hashlib.sha256(document).digest())
