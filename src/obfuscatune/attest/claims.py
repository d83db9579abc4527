"""What an attested program says of itself. The SHA-256 of these bytes is part of the report data."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from obfuscatune.documents import canonical, is_hex, parse
from obfuscatune.errors import EvidenceError, IntegrityError

VERSION = 1
ROLE = "enclave"
MOST_BYTES = 256 * 1024
"""Of claims. Arguments and environment are the larger part of them."""
PROFILES = ("paper", "private", "guarded", "enclave")
"""From the one that hides least to the one that hides most."""


@dataclass(frozen=True)
class Software:
    """The program that runs."""

    name: str
    version: str
    digest: str
    """SHA-256 of what was installed, in hex."""


@dataclass(frozen=True)
class Claims:
    """Claims of an enclave. Digests and public keys are 32 bytes in lower-case hex.

    Raises:
        EvidenceError: a field has not the form that it must have.
    """

    software: Software
    configuration: str
    """SHA-256 of the configuration file."""
    http_key: str
    """SHA-256 of the SubjectPublicKeyInfo of the HTTPS certificate."""
    hpke_key: str
    """X25519 public key: secrets are sealed to it."""
    signing_key: str
    """Ed25519 public key: receipts and log heads are signed by it."""
    boot: str
    """Random; drawn when the program starts."""
    profile: str = "private"
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: tuple[str, ...] = ()
    """SHA-256 of the SubjectPublicKeyInfo of each compute worker's certificate."""
    mask_workers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        software = (self.software.name, self.software.version)
        texts = (*software, *self.arguments, *self.environment, *self.environment.values())
        if not all(isinstance(text, str) for text in texts):
            raise EvidenceError("claims: software, arguments and environment are texts")
        digests = {
            "software.digest": (self.software.digest,),
            "configuration": (self.configuration,),
            "http_key": (self.http_key,),
            "hpke_key": (self.hpke_key,),
            "signing_key": (self.signing_key,),
            "boot": (self.boot,),
            "workers": self.workers,
            "mask_workers": self.mask_workers,
        }
        for name, values in digests.items():
            if not all(map(is_hex, values)):
                raise EvidenceError(f"claims: {name} is 32 bytes in lower-case hex")
        if self.profile not in PROFILES:
            raise EvidenceError(f"claims: profile is one of {', '.join(PROFILES)}")
        if len(self.to_bytes()) > MOST_BYTES:
            raise EvidenceError(f"claims of more than {MOST_BYTES:,} bytes")

    def to_document(self) -> dict[str, Any]:
        """The claims as a document."""
        return {
            "version": VERSION,
            "role": ROLE,
            "software": {
                "name": self.software.name,
                "version": self.software.version,
                "digest": self.software.digest,
            },
            "arguments": list(self.arguments),
            "environment": dict(self.environment),
            "configuration": self.configuration,
            "http_key": self.http_key,
            "hpke_key": self.hpke_key,
            "signing_key": self.signing_key,
            "profile": self.profile,
            "workers": list(self.workers),
            "mask_workers": list(self.mask_workers),
            "boot": self.boot,
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        try:
            return canonical(self.to_document())
        except ValueError as error:  # a lone surrogate in the environment, say
            raise EvidenceError(f"claims: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "Claims":
        """Read claims, strictly: the canonical bytes alone, with every field and no other.

        Raises:
            EvidenceError: they are none.
        """
        try:
            document = parse(data, most_bytes=MOST_BYTES)
        except IntegrityError as error:
            raise EvidenceError(f"claims: {error}") from error
        claims = cls.from_document(document)
        if claims.to_bytes() != data:
            raise EvidenceError("claims: these are not the canonical bytes of the document")
        return claims

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Claims":
        """Read claims from a document that was parsed already.

        Raises:
            EvidenceError: they are none.
        """
        _check_form(document)
        fields = {name: document[name] for name in ("configuration", "http_key", "hpke_key", "signing_key", "boot")}
        return cls(
            software=Software(**document["software"]),
            profile=document["profile"],
            arguments=tuple(document["arguments"]),
            environment=dict(document["environment"]),
            workers=tuple(document["workers"]),
            mask_workers=tuple(document["mask_workers"]),
            **fields,
        )

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes: what the report data binds."""
        return hashlib.sha256(self.to_bytes()).digest()


_FIELDS: dict[str, type] = {
    "version": int,
    "role": str,
    "software": dict,
    "arguments": list,
    "environment": dict,
    "configuration": str,
    "http_key": str,
    "hpke_key": str,
    "signing_key": str,
    "profile": str,
    "workers": list,
    "mask_workers": list,
    "boot": str,
}


def _check_form(document: Mapping[str, Any]) -> None:
    for name in (*_FIELDS, *document):
        if name not in document or name not in _FIELDS:
            raise EvidenceError(f"claims: {'unknown' if name in document else 'missing'} field {name!r:.80}")
        if type(document[name]) is not _FIELDS[name]:
            raise EvidenceError(f"claims: {name} has the wrong type")
    if document["version"] != VERSION or document["role"] != ROLE:
        raise EvidenceError(f"claims: version {VERSION} of the role {ROLE!r} is what is read here")
    if set(document["software"]) != {"name", "version", "digest"}:
        raise EvidenceError("claims: software has a name, a version and a digest")
