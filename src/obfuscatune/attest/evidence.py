"""Evidence: a quote or report of a platform, with what is needed to verify it, as one JSON document.

    {"version": 1, "kind": "tdx", "quote": <base64>, "certificates": [<base64 DER>...], "collateral": {...},
     "parts": [<the same without parts>...]}

Certificates and collateral come from the attester and are untrusted until they chain to a pinned root. `parts` is
further evidence over the same report data: the GPUs' beside the CPU's.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, get_args

from obfuscatune.documents import canonical, parse
from obfuscatune.errors import EvidenceError, IntegrityError

VERSION = 1
MOST_BYTES = 2**20
"""Of evidence with its parts. A TDX quote with its collateral takes 30 KB, a GPU's report with certificates 15 KB."""
MOST_PARTS = 16
"""Besides the first: a machine has at most eight GPUs."""
MOST_CERTIFICATES = 16
REPORT_DATA_BYTES = 64

Kind = Literal["tdx", "sgx", "sev-snp", "nvidia", "tpm", "simulated"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Evidence:
    """A quote or report with its certificates and collateral.

    Raises:
        EvidenceError: the kind is unknown, parts have parts, or there are too many.
    """

    kind: Kind
    quote: bytes
    certificates: tuple[bytes, ...] = ()
    """DER, from the key that signed the quote up to the root. None where the quote holds them itself."""
    collateral: Mapping[str, str] = field(default_factory=dict)
    """What else its verifier reads, by name; docs/attestation.md lists it by kind."""
    parts: "tuple[Evidence, ...]" = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise EvidenceError(f"evidence of the kind {self.kind!r:.80}; known are {', '.join(KINDS)}")
        if len(self.parts) > MOST_PARTS or len(self.certificates) > MOST_CERTIFICATES:
            raise EvidenceError(f"evidence has at most {MOST_PARTS} parts, of {MOST_CERTIFICATES} certificates each")
        if any(part.parts for part in self.parts):
            raise EvidenceError("a part of evidence has no parts itself")

    @property
    def each(self) -> "tuple[Evidence, ...]":
        """This evidence and its parts."""
        return (self, *self.parts)

    def to_document(self) -> dict[str, Any]:
        """The evidence as a document."""
        return {"version": VERSION, **self._own_fields(), "parts": [part._own_fields() for part in self.parts]}

    def to_bytes(self) -> bytes:
        """The canonical bytes.

        Raises:
            EvidenceError: they are more than a verifier reads.
        """
        data = canonical(self.to_document())
        if len(data) > MOST_BYTES:
            raise EvidenceError(f"evidence of {len(data):,} bytes; verifiers read at most {MOST_BYTES:,}")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Evidence":
        """Read evidence, strictly.

        Raises:
            EvidenceError: it is none, or larger than `MOST_BYTES`.
        """
        try:
            return cls.from_document(parse(data, most_bytes=MOST_BYTES))
        except IntegrityError as error:
            raise EvidenceError(f"evidence: {error}") from error

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Evidence":
        """Read evidence from a document that was parsed already.

        Raises:
            EvidenceError: it is none.
        """
        if set(document) != {"version", "kind", "quote", "certificates", "collateral", "parts"}:
            raise EvidenceError("evidence has a version, kind, quote, certificates, collateral and parts, nothing else")
        if document["version"] != VERSION or type(document["version"]) is not int:
            raise EvidenceError(f"evidence of version {document['version']!r:.80}; this program reads {VERSION}")
        parts = document["parts"]
        if not isinstance(parts, list) or len(parts) > MOST_PARTS:
            raise EvidenceError(f"evidence: parts is a list of at most {MOST_PARTS}")
        return cls(
            *_read_own_fields({name: it for name, it in document.items() if name not in ("version", "parts")}),
            parts=tuple(cls(*_read_own_fields(part)) for part in parts),
        )

    def _own_fields(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "quote": base64.b64encode(self.quote).decode(),
            "certificates": [base64.b64encode(certificate).decode() for certificate in self.certificates],
            "collateral": dict(self.collateral),
        }


class Producer(Protocol):
    """A platform that gives evidence of the program that runs on it."""

    def attest(self, report_data: bytes) -> Evidence:
        """Evidence over 64 bytes.

        Raises:
            EvidenceError: the platform gave none.
        """


def check_report_data(report_data: bytes) -> bytes:
    """The bytes themselves, if they are 64.

    Raises:
        EvidenceError: they are not.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise EvidenceError(f"report data has {REPORT_DATA_BYTES} bytes, not {len(report_data)}")
    return report_data


def _read_own_fields(document: Any) -> tuple[Kind, bytes, tuple[bytes, ...], dict[str, str]]:
    if not isinstance(document, dict) or set(document) != {"kind", "quote", "certificates", "collateral"}:
        raise EvidenceError("a part of evidence has a kind, quote, certificates and collateral, nothing else")
    kind, certificates, collateral = document["kind"], document["certificates"], document["collateral"]
    if not isinstance(certificates, list) or len(certificates) > MOST_CERTIFICATES:
        raise EvidenceError(f"evidence: certificates is a list of at most {MOST_CERTIFICATES}")
    if not isinstance(collateral, dict) or not all(isinstance(value, str) for value in collateral.values()):
        raise EvidenceError("evidence: collateral is texts by name")
    if not isinstance(kind, str):
        raise EvidenceError("evidence: kind is a text")
    return (
        cast(Kind, kind),  # held against KINDS by Evidence itself
        decode_base64(document["quote"], "evidence: quote"),
        tuple(decode_base64(certificate, "evidence: a certificate") for certificate in certificates),
        collateral,
    )


def decode_base64(text: Any, what: str) -> bytes:
    """The bytes that a text stands for. Raises EvidenceError: it is no base64; the message begins with `what`."""
    try:
        if not isinstance(text, str):
            raise binascii.Error("no text")
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvidenceError(f"{what} is base64, and this is none: {error}") from error
