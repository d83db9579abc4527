"""What a provider signs: a grant with its terms, a consent, a revocation.

Each is a signed document (`documents.sign`) with a purpose of its own. It counts when it comes, over the attested
channel, from whoever signed it: nobody else can give it, or give it again.
"""

import datetime
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from obfuscatune import documents
from obfuscatune.channel.identity import Identity, signer_fingerprint
from obfuscatune.documents import is_hex, is_whole
from obfuscatune.errors import IntegrityError, TermsError

VERSION = 1
USES = ("inference", "fine-tuning")
EXPORTS = ("never", "provider-consent", "allowed")
MOST_OWNERS = 256
MOST_TOKENS = 2**53
"""Every JSON reader holds integers up to here."""
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TEXT = re.compile(r"[ -~]{0,1024}")
_ADAPTER = re.compile(r"[!-~]{1,200}")


def next_sequence() -> int:
    """Larger than before: milliseconds on the clock of whoever signs."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Terms:
    """What a grant allows.

    Raises:
        IntegrityError: a term is outside its range.
    """

    owners: tuple[str, ...]
    """Fingerprints of their keys (SHA-256 of SubjectPublicKeyInfo, in hex)."""
    uses: tuple[str, ...]
    export: str
    """Whether an owner may take his adapter out of the enclave."""
    until: datetime.datetime
    """In UTC. From then on nothing is allowed."""
    tokens: int | None = None
    """Most tokens, of all owners and uses together; None for any number."""

    def __post_init__(self) -> None:
        _need(1 <= len(self.owners) <= MOST_OWNERS, f"owners: 1 to {MOST_OWNERS} fingerprints")
        _need(all(map(is_hex, self.owners)), "owners: SHA-256 fingerprints in small hex")
        _need(len(set(self.owners)) == len(self.owners), "owners: each one once")
        _need(bool(self.uses) and all(use in USES for use in self.uses), f"uses: some of {', '.join(USES)}")
        _need(len(set(self.uses)) == len(self.uses), "uses: each one once")
        _need(self.export in EXPORTS, f"export: one of {', '.join(EXPORTS)}")
        _need(self.until.utcoffset() == datetime.timedelta(0) and not self.until.microsecond, "until: seconds, in UTC")
        _need(self.tokens is None or is_whole(self.tokens, 1, MOST_TOKENS), f"tokens: 1 to {MOST_TOKENS}, or null")

    def check(self, owner: str, use: str, now: datetime.datetime, tokens_used: int, tokens_wanted: int = 1) -> None:
        """Whether `owner` may use the model so, now.

        Args:
            tokens_used: by all owners, since the first grant of these terms.
            tokens_wanted: at most, by what is asked for.

        Raises:
            TermsError: he may not; the message names the term.
        """
        self.check_owner(owner, now)
        if use not in self.uses:
            raise TermsError(f"uses: the provider allows {' and '.join(self.uses)}, not {use}")
        if self.tokens is not None and tokens_used + tokens_wanted > self.tokens:
            raise TermsError(
                f"tokens: {tokens_used:,} of {self.tokens:,} are used, and {tokens_wanted:,} are asked for"
            )

    def check_owner(self, owner: str, now: datetime.datetime) -> None:
        """Raises TermsError: the owner is not named, or the time is over."""
        if owner not in self.owners:
            raise TermsError(f"owners: the provider does not name the key {owner}")
        if now >= self.until:
            raise TermsError(f"until: the provider allowed it until {_write_time(self.until)}")

    def to_document(self) -> dict[str, Any]:
        """As it is signed."""
        return {
            "owners": list(self.owners),
            "uses": list(self.uses),
            "export": self.export,
            "until": _write_time(self.until),
            "tokens": self.tokens,
        }

    @classmethod
    def from_document(cls, document: Any) -> "Terms":
        """Raises IntegrityError: it is none."""
        _need_fields(document, "terms", {"owners", "uses", "export", "until", "tokens"})
        _need(isinstance(document["owners"], list) and isinstance(document["uses"], list), "owners and uses are lists")
        until = _read_time(document["until"])
        return cls(tuple(document["owners"]), tuple(document["uses"]), document["export"], until, document["tokens"])


@dataclass(frozen=True, slots=True)
class Signed:
    """What grants, revocations and consents have in common: a provider signs each, about one model.

    Raises:
        IntegrityError: a field is outside its range.
    """

    PURPOSE: ClassVar[str]

    model: str
    """The name by which clients ask for it."""
    manifest: str
    """Digest of the bundle's manifest: this very model and no other."""
    provider: str = field(default="", kw_only=True)
    """Ed25519 key, in hex, of the signature that was verified; empty before it is signed."""
    signed: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    """The signed document that it was read of."""

    def __post_init__(self) -> None:
        _need(_matches(_MODEL, self.model), "model: 1 to 64 letters, digits, dots, dashes and underscores")
        _need(is_hex(self.manifest), "manifest: a SHA-256 digest in small hex")
        self._check()

    def _check(self) -> None:
        """Raises IntegrityError: a field that the kind alone has is outside its range."""

    def to_document(self) -> dict[str, Any]:
        """As it is signed."""
        return {"version": VERSION} | {name: getattr(self, name) for name in self._names()}

    def sign(self, identity: Identity) -> dict[str, Any]:
        """Signed by the provider."""
        return identity.sign(self.to_document(), self.PURPOSE)

    @classmethod
    def from_signed(cls, signed: Mapping[str, Any], sender: str | None = None) -> Self:
        """Read what its sender signed.

        Args:
            sender: fingerprint of the key that the sender proved to have. None reads what was sent before and kept:
                `provider` says who signed it.

        Raises:
            IntegrityError: it is none, or another signed it.
        """
        key = signed.get("key") if isinstance(signed, Mapping) else None
        _need(is_hex(key), f"a {cls.PURPOSE} has to be signed by an Ed25519 key")
        if sender is not None and _fingerprint(str(key)) != sender:
            raise IntegrityError(f"a {cls.PURPOSE} has to be signed by the key that it is sent with")
        document = documents.verify(signed, cls.PURPOSE, {str(key)})
        _need_fields(document, cls.PURPOSE, {"version", *cls._names()})
        version = document.pop("version")
        _need(is_whole(version, VERSION, VERSION), f"a {cls.PURPOSE} of another version than {VERSION}")
        return cls(**cls._read(document), provider=str(key), signed=dict(signed))

    @classmethod
    def _read(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The values of fields. Raises IntegrityError: one cannot be read."""
        return document

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(it.name for it in fields(cls) if not it.kw_only)


@dataclass(frozen=True, slots=True)
class Grant(Signed):
    """A provider lets an enclave use his model."""

    PURPOSE = "grant"

    storage: str
    """Where the bundle may lie: a hint, since it opens by its manifest alone."""
    terms: Terms
    sequence: int
    """Rises with each grant and revocation of a model: an older one is refused."""
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    def _check(self) -> None:
        _check_sequence(self.sequence)
        _need(_matches(_TEXT, self.storage), "storage: at most 1024 printable ASCII characters")
        _need(is_hex(self.id, 16), "id: 16 bytes in small hex")

    def to_document(self) -> dict[str, Any]:
        """As it is signed."""
        return {**Signed.to_document(self), "terms": self.terms.to_document()}

    @classmethod
    def _read(cls, document: dict[str, Any]) -> dict[str, Any]:
        return {**document, "terms": Terms.from_document(document["terms"])}


@dataclass(frozen=True, slots=True)
class Revocation(Signed):
    """A provider takes back all that he granted for a model up to a sequence."""

    PURPOSE = "revocation"

    sequence: int

    def _check(self) -> None:
        _check_sequence(self.sequence)


@dataclass(frozen=True, slots=True)
class Consent(Signed):
    """A provider lets one adapter leave the enclave, to its owner."""

    PURPOSE = "consent"

    owner: str
    adapter: str
    """As the enclave names it."""

    def _check(self) -> None:
        _need(is_hex(self.owner), "owner: a SHA-256 fingerprint in small hex")
        _need(_matches(_ADAPTER, self.adapter), "adapter: 1 to 200 printable ASCII characters")


def read_time(text: str) -> datetime.datetime:
    """A date, whose beginning is meant, or a time as 2027-01-01T12:00:00Z; both in UTC.

    Raises:
        IntegrityError: it is neither.
    """
    return _read_time(f"{text}T00:00:00Z" if "T" not in text else text)


def _read_time(text: Any) -> datetime.datetime:
    try:
        if not _matches(re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII), text):
            raise ValueError("another form")
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError:
        raise IntegrityError("until: expected a time in UTC as 2027-01-01T12:00:00Z") from None


def _write_time(moment: datetime.datetime) -> str:
    return f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}Z"


def _fingerprint(key: str) -> str | None:
    try:
        return signer_fingerprint(key)
    except ValueError:
        return None


def _check_sequence(sequence: Any) -> None:
    _need(is_whole(sequence, 0, MOST_TOKENS), f"sequence: 0 to {MOST_TOKENS}")


def _need_fields(document: Any, what: str, names: set[str]) -> None:
    _need(isinstance(document, dict) and set(document) == names, f"{what}: has {', '.join(sorted(names))}, no other")


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise IntegrityError(what)


def _matches(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None
