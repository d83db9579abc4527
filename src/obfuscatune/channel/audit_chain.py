"""The audit log's chain, for whoever has a copy of it. Without disk and network.

A line is `{"chain": <hex>, "entry": {...}}`, canonical JSON. With `digest_n` the SHA-256 of an entry's canonical bytes,

    chain_n = SHA-256("obfuscatune/audit/v1" || chain_(n-1) || digest_n),    chain_(-1) = 32 zero bytes.

In a party's copy the entries of others stand as `{"chain": ..., "digest": <hex>}`, and the chain verifies all the same;
each entry has a random salt, so that its digest tells nothing of it. The copy ends with `{"head": <signed>}`: number of
entries and last chain value, signed by the key that the claims name. Whoever keeps a head proves by the lines behind it
that a later log goes on from it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from obfuscatune.documents import canonical, has_fields, is_hex, parse, verify
from obfuscatune.errors import IntegrityError

PURPOSE = "audit-head"
MOST_LINE_BYTES = 64 * 2**10
MOST_ENTRIES = 2**53
"""Every JSON reader holds integers up to here."""
START = bytes(32)
_LABEL = b"obfuscatune/audit/v1"
_FIELDS = {"n", "at", "who", "what", "details", "salt"}


def next_chain(chain: bytes, digest: bytes) -> bytes:
    """The chain's value after an entry with that digest."""
    return hashlib.sha256(_LABEL + chain + digest).digest()


@dataclass(frozen=True, slots=True)
class Head:
    """How far a log goes."""

    count: int
    """Number of entries."""
    chain: bytes
    """The chain's value after the last one."""
    at: int = 0
    """When it was signed, in Unix seconds."""
    signed: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The signed document that it was read of."""

    def to_document(self) -> dict[str, Any]:
        """As it is signed."""
        return {"version": 1, "count": self.count, "chain": self.chain.hex(), "at": self.at}

    @classmethod
    def from_document(cls, document: Any) -> "Head":
        """Raises IntegrityError: it is none."""
        if not has_fields(document, {"version": int, "count": int, "chain": str, "at": int}):
            raise IntegrityError("no head of a log: it has a version, a count, a chain and a time")
        count, chain, at = document["count"], document["chain"], document["at"]
        if document["version"] != 1 or not (0 <= count <= MOST_ENTRIES and 0 <= at < 2**33):
            raise IntegrityError("a head of a log outside its range, or of another version than 1")
        if not is_hex(chain):
            raise IntegrityError("a head of a log without a chain value")
        return cls(count, bytes.fromhex(chain), at)

    @classmethod
    def from_signed(cls, signed: Any, keys: frozenset[str]) -> "Head":
        """Read a head that one of `keys` signed. Raises IntegrityError: it is none."""
        signed = signed if isinstance(signed, dict) else {}
        return replace(cls.from_document(verify(signed, PURPOSE, keys)), signed=signed)


def verify_copy(
    file: BinaryIO, keys: frozenset[str], earlier: Head | None = None, *, begins_at: Head | None = None
) -> tuple[Head, int]:
    """Verify a party's copy of a log, or the end of one.

    Args:
        keys: Ed25519 public keys in hex, one of which must have signed the head.
        earlier: an earlier head, which this log must go on from.
        begins_at: the head behind which `file` begins; None for a copy from the log's beginning.

    Returns:
        The head, and the number of entries in clear.

    Raises:
        IntegrityError: entries were changed, left out or reordered; the head is missing or another's; or the log does
            not go on from the earlier one.
    """
    count, chain = (0, START) if begins_at is None else (begins_at.count, begins_at.chain)
    clear, met = 0, earlier is None or earlier.count == 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        fields = parse_line(line, count)
        if set(fields) == {"head"}:
            if file.read(1):
                raise IntegrityError("something stands behind the head of the log")
            head = Head.from_signed(fields["head"], keys)
            if begins_at is not None and head.count < begins_at.count:
                raise IntegrityError(f"the log has {head.count:,} entries, and had {begins_at.count:,} before")
            if (head.count, head.chain) != (count, chain):
                raise IntegrityError(
                    f"the head is of {head.count:,} entries with another chain value than these {count:,} have"
                )
            if not met:
                raise IntegrityError("this log does not go on from the earlier head: entries were taken back")
            return head, clear
        chain, is_clear = step(fields, chain, count)
        clear += is_clear
        count += 1
        if earlier is not None and earlier.count == count:
            met = earlier.chain == chain
    raise IntegrityError(f"the log ends after {count:,} entries without a signed head: its end was cut off")


def parse_line(line: bytes, count: int) -> dict[str, Any]:
    """A line's object; `count` lines stand before it. Raises IntegrityError: it is none."""
    if not line.endswith(b"\n"):
        raise IntegrityError(f"line {count + 1} of the log has no end, or more than {MOST_LINE_BYTES} bytes")
    try:
        return parse(line, most_bytes=MOST_LINE_BYTES)
    except IntegrityError as error:
        raise IntegrityError(f"line {count + 1} of the log: {error}") from error


def step(fields: Mapping[str, Any], chain: bytes, count: int) -> tuple[bytes, bool]:
    """The chain's value after a line, and whether its entry is in clear.

    Raises:
        IntegrityError: the line has another chain value than the one that follows.
    """
    if set(fields) == {"chain", "entry"} and isinstance(fields["entry"], dict):
        entry = fields["entry"]
        if set(entry) != _FIELDS or entry["n"] != count:
            raise IntegrityError(f"line {count + 1} of the log is not the entry of that number")
        digest = hashlib.sha256(canonical(entry)).digest()
    elif set(fields) == {"chain", "digest"}:
        if not is_hex(fields["digest"]):
            raise IntegrityError(f"line {count + 1} of the log has no digest")
        digest = bytes.fromhex(fields["digest"])
    else:
        raise IntegrityError(f"line {count + 1} of the log is neither an entry, a digest nor a head")
    found = next_chain(chain, digest)
    if fields["chain"] != found.hex():
        raise IntegrityError(f"the chain breaks at line {count + 1} of the log: this entry or one before was changed")
    return found, "entry" in fields
