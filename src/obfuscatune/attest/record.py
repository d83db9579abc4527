"""What was attested in one session, and what a verifier found: two kinds of file for people, auditors, other programs.

    evidence file           evidence, claims, binding, when it was obtained
    verification document   the same with the policy, the time, and every check

A verification document holds all that it takes to verify again, without a network and without asking anybody.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.checks import Check, shown
from obfuscatune.attest.claims import Claims
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.verification import Verified, verify
from obfuscatune.documents import canonical, has_fields, read
from obfuscatune.errors import ConfigError, EvidenceError, IntegrityError, VerificationFailed

VERSION = 1
SESSION, VERIFICATION = "attested-session", "verification"
MOST_BYTES = 4 * 2**20
"""Of either file: evidence, claims and policy at their largest."""


@dataclass(frozen=True)
class Session:
    """Evidence, and what it was to be bound to."""

    evidence: Evidence
    claims: Claims
    binding: Binding
    obtained: int
    """When the evidence came, by the verifier's clock, in Unix seconds."""

    def verify(self, policy: Policy, now: int) -> Verified:
        """Verify the evidence for this session.

        Raises:
            VerificationFailed: a check failed. It carries them all.
            EvidenceError: the evidence is malformed.
        """
        return verify(
            self.evidence,
            policy,
            report_data=self.binding.report_data(self.claims),
            claims=self.claims,
            nonce=self.binding.nonce,
            now=now,
            obtained=self.obtained,
        )

    def to_document(self) -> dict[str, Any]:
        """The session as a document, which is an evidence file's content."""
        return {
            "version": VERSION,
            "type": SESSION,
            "evidence": self.evidence.to_document(),
            "claims": self.claims.to_document(),
            "binding": self.binding.to_document(),
            "obtained": self.obtained,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read a session.

        Raises:
            EvidenceError: it is none.
        """
        _check_fields(document, SESSION, {"evidence": dict, "claims": dict, "binding": dict, "obtained": int})
        return cls(
            Evidence.from_document(document["evidence"]),
            Claims.from_document(document["claims"]),
            Binding.from_document(document["binding"]),
            document["obtained"],
        )


@dataclass(frozen=True)
class Verification:
    """What a verifier found at a time: every check, whether or not all of them passed."""

    session: Session
    policy: Policy
    time: int
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed; none is not enough."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def simulated(self) -> bool:
        """Whether any of the evidence was simulated: then nothing is proven."""
        return any(part.kind == "simulated" for part in self.session.evidence.each)

    @property
    def expires(self) -> int:
        """When it has to be verified anew, in Unix seconds."""
        return self.policy.expires(self.session.obtained)

    def repeat(self) -> "Verification":
        """The same verification, made again from the evidence at the same time."""
        return examine(self.session, self.policy, self.time)

    def to_document(self) -> dict[str, Any]:
        """The verification document."""
        return {
            "version": VERSION,
            "type": VERIFICATION,
            "session": self.session.to_document(),
            "policy": self.policy.to_document(),
            "policy_digest": self.policy.digest,
            "time": self.time,
            "passed": self.passed,
            "simulated": self.simulated,
            "checks": [check.to_document() for check in self.checks],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read a verification document. What it says of its checks is a claim: `repeat` makes them again.

        Raises:
            EvidenceError: it is none, or contradicts itself.
        """
        fields = {"session": dict, "policy": dict, "policy_digest": str, "time": int, "passed": bool}
        _check_fields(document, VERIFICATION, {**fields, "simulated": bool, "checks": list})
        try:
            policy = Policy.from_document(document["policy"], "the policy of the verification document")
        except ConfigError as error:
            raise EvidenceError(str(error)) from error
        checks = tuple(_read_check(check) for check in document["checks"])
        found = cls(Session.from_document(document["session"]), policy, document["time"], checks)
        said = (document["policy_digest"], document["passed"], document["simulated"])
        if said != (policy.digest, found.passed, found.simulated):
            raise EvidenceError("the verification document contradicts itself: policy digest, passed or simulated")
        return found


def examine(session: Session, policy: Policy, now: int) -> Verification:
    """Verify, and keep what was found instead of raising: for people and documents. Programs use `verify`."""
    try:
        checks = session.verify(policy, now).checks
    except VerificationFailed as error:
        checks = error.checks
    except EvidenceError as error:
        checks = (Check("evidence", False, "well-formed", shown(error)),)
    return Verification(session, policy, now, checks)


def read_record(path: Path) -> Session | Verification:
    """Read an evidence file or a verification document.

    Raises:
        ConfigError: the file cannot be read.
        EvidenceError: it is neither.
    """
    try:
        document = read(path, most_bytes=MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except IntegrityError as error:
        raise EvidenceError(f"{path}: {error}") from error
    kind = document.get("type")
    if kind == SESSION:
        return Session.from_document(document)
    if kind == VERIFICATION:
        return Verification.from_document(document)
    raise EvidenceError(f"{path}: the type is {SESSION} or {VERIFICATION}, not {kind!r:.80}")


def to_file_bytes(record: Session | Verification) -> bytes:
    """The content of a file."""
    return canonical(record.to_document()) + b"\n"


def _check_fields(document: Mapping[str, Any], kind: str, fields: Mapping[str, type]) -> None:
    expected = {"version": int, "type": str, **fields}
    if not has_fields(document, expected):
        raise EvidenceError(f"{kind}: expected {', '.join(expected)}, each of its type")
    if document["version"] != VERSION or document["type"] != kind:
        raise EvidenceError(f"{kind}: this program reads version {VERSION}")


def _read_check(document: Any) -> Check:
    if not has_fields(document, {"name": str, "passed": bool, "expected": str, "found": str}):
        raise EvidenceError("a check has a name, passed, expected and found")
    return Check(shown(document["name"]), document["passed"], shown(document["expected"]), shown(document["found"]))
