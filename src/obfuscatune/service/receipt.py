"""The receipt of a job: what was trained on what, by which code, with whose workers. Signed, and nothing private in it.

`documents.sign`, purpose "receipt", by the key that the claims name. The claims are bound by evidence of their own:
report data over them, a nonce, the key of the HTTPS certificate, and zeros in the place of a session. So a third
person verifies a receipt offline: signature, claims, evidence by a policy. What it says of data and adapter are
digests; whoever has the files compares them.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.claims import Claims
from obfuscatune.attest.evidence import Evidence, Producer
from obfuscatune.documents import digest, sign, verify
from obfuscatune.errors import IntegrityError

if TYPE_CHECKING:
    from obfuscatune.attest.policy import Policy
    from obfuscatune.attest.verification import Verified

PURPOSE = "receipt"
VERSION = 1
NO_SESSION = bytes(32)
"""In the place of a TLS exporter and of a verifier's key: no session has either."""
_OF_JOB = "job owner model data adapter recipe products masks losses steps tokens began ended"
_OF_PLACE = "profile workers mask_workers claims evidence nonce attester"
_FIELDS = frozenset(["version", *_OF_JOB.split(), *_OF_PLACE.split()])


@dataclass(frozen=True)
class Attestation:
    """Claims, and evidence of them that belongs to no session."""

    claims: Claims
    evidence: Evidence
    nonce: bytes
    attester: bytes
    """SHA-256 of the HTTPS certificate's public key."""

    @classmethod
    def make(cls, claims: Claims, producer: Producer) -> "Attestation":
        """Have the platform attest.

        Raises:
            EvidenceError: it gave no evidence.
        """
        attester, nonce = bytes.fromhex(claims.http_key), bytes.fromhex(claims.boot)
        report_data = Binding(NO_SESSION, attester, NO_SESSION, nonce).report_data(claims)
        return cls(claims, producer.attest(report_data), nonce, attester)

    def to_document(self) -> dict[str, Any]:
        """As it stands in a receipt."""
        return {
            "claims": self.claims.to_document(),
            "evidence": self.evidence.to_document(),
            "nonce": self.nonce.hex(),
            "attester": self.attester.hex(),
        }


def make_receipt(about: Mapping[str, Any], attestation: Attestation, key: Ed25519PrivateKey) -> dict[str, Any]:
    """A signed receipt.

    Args:
        about: the fields that speak of the job.
    """
    claims = attestation.claims
    document = {
        "version": VERSION,
        **about,
        "profile": claims.profile,
        "workers": list(claims.workers),
        "mask_workers": list(claims.mask_workers),
        **attestation.to_document(),
    }
    return sign(document, PURPOSE, key)


def about_job(
    *,
    job: str,
    owner: str,
    model: Mapping[str, str],
    data: Mapping[str, str | None],
    recipe: Mapping[str, Any],
    adapter: Mapping[str, str],
    products: Mapping[str, int],
    masks: Mapping[str, Any] | None,
    losses: str,
    steps: int,
    tokens: int,
    began: int,
) -> dict[str, Any]:
    """The fields that speak of a job. Numbers with fractions become texts, which a document holds."""
    return {
        "job": job,
        "owner": owner,
        "model": dict(model),
        "data": dict(data),
        "adapter": dict(adapter),
        "recipe": _texts(recipe),
        "products": dict(products),
        "masks": None if masks is None else _texts(masks),
        "losses": losses,
        "steps": steps,
        "tokens": tokens,
        "began": began,
        "ended": int(time.time()),
    }


def _texts(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: it if it is None or isinstance(it, bool | int | str) else repr(it) for name, it in values.items()}


@dataclass(frozen=True)
class VerifiedReceipt:
    """A receipt that holds. `verified` is None where no policy was given: then the key is all that was checked."""

    document: Mapping[str, Any]
    verified: "Verified | None"


def verify_receipt(
    signed: Mapping[str, Any], *, key: str | None = None, policy: "Policy | None" = None, now: int
) -> VerifiedReceipt:
    """Verify a receipt: by its evidence, by a key that is known, or by both.

    Args:
        key: Ed25519, in hex: what the service's verified claims name as `signing_key`.
        policy: what evidence is accepted. Evidence is as old as the service's start.
        now: Unix seconds.

    Raises:
        IntegrityError: it was changed, its parts do not belong together, or neither key nor policy is given.
        VerificationFailed, EvidenceError: the policy refuses the evidence.
    """
    if key is None and policy is None:
        raise IntegrityError("a receipt is verified by a key that is known, or by a policy for its evidence")
    unverified = signed.get("document")
    if not isinstance(unverified, dict) or set(unverified) != _FIELDS:
        raise IntegrityError("no receipt: its fields are " + ", ".join(sorted(_FIELDS)))
    claims = Claims.from_document(_document(unverified["claims"]))
    if key is not None and claims.signing_key != key:
        raise IntegrityError("the receipt's claims name another signing key than the one that is trusted")
    document = verify(signed, PURPOSE, {claims.signing_key})
    if document["version"] != VERSION:
        raise IntegrityError(f"a receipt of version {document['version']!r:.20}; this program reads {VERSION}")
    same = [document["profile"] == claims.profile, document["workers"] == list(claims.workers)]
    if not all([*same, document["mask_workers"] == list(claims.mask_workers)]):
        raise IntegrityError("profile or workers of the receipt are not those of its claims")
    if policy is None:
        return VerifiedReceipt(document, None)
    from obfuscatune.attest.verification import verify as verify_evidence

    nonce, attester = _bytes(document["nonce"]), _bytes(document["attester"])
    if attester.hex() != claims.http_key:
        raise IntegrityError("the receipt's evidence is of another attester than its claims")
    report_data = Binding(NO_SESSION, attester, NO_SESSION, nonce).report_data(claims)
    evidence = Evidence.from_document(_document(document["evidence"]))
    verified = verify_evidence(evidence, policy, report_data=report_data, claims=claims, nonce=nonce, now=now)
    return VerifiedReceipt(document, verified)


def receipt_digest(signed: Mapping[str, Any]) -> str:
    """SHA-256 of a signed receipt, in hex."""
    return digest(dict(signed))


def file_digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of files by name, in hex: what a receipt says of an adapter."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _document(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError("no receipt: claims and evidence are objects")
    return value


def _bytes(value: Any) -> bytes:
    try:
        found = bytes.fromhex(value)
    except (TypeError, ValueError):
        raise IntegrityError("no receipt: nonce and attester are 32 bytes in hex") from None
    if len(found) != 32:
        raise IntegrityError("no receipt: nonce and attester are 32 bytes in hex")
    return found
