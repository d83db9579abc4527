"""What binds evidence to one session between two parties: 64 bytes of report data.

    SHA-512 over length-prefixed fields: label, role, TLS exporter value, attester, verifier, nonce, claims

Each field is preceded by its length in 4 bytes, big-endian. docs/spec/attested-channel.md says what each one stops.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from obfuscatune.attest.claims import ROLE, Claims
from obfuscatune.errors import EvidenceError

LABEL = "obfuscatune/attest/v1"
NONCE_BYTES = 32
_FIELDS = ("exporter", "attester", "verifier", "nonce")


@dataclass(frozen=True)
class Binding:
    """One session. Each field is 32 bytes.

    Raises:
        EvidenceError: one is not.
    """

    exporter: bytes
    """Value of the TLS exporter with the nonce as its context."""
    attester: bytes
    """SHA-256 of the SubjectPublicKeyInfo of the attester's TLS certificate."""
    verifier: bytes
    """The same of the verifier's."""
    nonce: bytes
    """Random; drawn by the verifier for this session alone."""

    def __post_init__(self) -> None:
        for name in _FIELDS:
            if len(getattr(self, name)) != NONCE_BYTES:
                raise EvidenceError(f"binding: {name} has {NONCE_BYTES} bytes, not {len(getattr(self, name))}")

    def report_data(self, claims: Claims) -> bytes:
        """The 64 bytes that evidence over these claims must carry in this session."""
        fields = (LABEL.encode(), ROLE.encode(), self.exporter, self.attester, self.verifier, self.nonce, claims.digest)
        return hashlib.sha512(b"".join(len(it).to_bytes(4, "big") + it for it in fields)).digest()

    def to_document(self) -> dict[str, str]:
        """The fields in hex, with the label."""
        return {"label": LABEL, **{name: getattr(self, name).hex() for name in _FIELDS}}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Binding":
        """Read a binding.

        Raises:
            EvidenceError: it is none.
        """
        if set(document) != {"label", *_FIELDS} or document["label"] != LABEL:
            raise EvidenceError(f"a binding has the label {LABEL!r} and {', '.join(_FIELDS)}")
        try:
            return cls(*(bytes.fromhex(document[name]) for name in _FIELDS))
        except (TypeError, ValueError) as error:
            raise EvidenceError(f"binding: {error}") from error
