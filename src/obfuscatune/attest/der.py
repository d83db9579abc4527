"""X.509 certificates and revocation lists, read by hand as far as AMD's need it.

AMD's chip certificates have the serial number 0, which `cryptography` warns of and will refuse. So their structure is
read here, strictly; every signature is checked by `cryptography`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from obfuscatune.errors import EvidenceError

MOST_BYTES = 64 * 1024
"""Of a certificate or revocation list. AMD's have less than 2 KB."""

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID = 0x01, 0x02, 0x03, 0x04, 0x06
SEQUENCE, SET, UTC_TIME, GENERALIZED_TIME = 0x30, 0x31, 0x17, 0x18


@dataclass(frozen=True)
class Value:
    """One value of DER."""

    tag: int
    content: bytes
    whole: bytes
    """With tag and length."""

    def items(self) -> "list[Value]":
        """The values within a constructed one."""
        return list(_values(self.content))

    def expect(self, tag: int, what: str) -> "Value":
        """The value itself, if it has this tag."""
        if self.tag != tag:
            raise EvidenceError(f"{what}: expected the DER tag {tag:#x}, found {self.tag:#x}")
        return self


@dataclass(frozen=True)
class Signed:
    """What a certificate and a revocation list have in common."""

    signed_bytes: bytes
    algorithm: str
    algorithm_bytes: bytes
    """The whole AlgorithmIdentifier. No signature covers it: it is repeated within what is signed."""
    signature: bytes
    fields: "tuple[Value, ...]"


@dataclass(frozen=True)
class Certificate:
    """The fields of a certificate that a chain is checked by."""

    signed: Signed
    serial: int
    issuer: bytes
    subject: bytes
    """Names as DER, to be compared byte by byte."""
    common_name: str
    not_before: int
    not_after: int
    public_key: bytes
    """SubjectPublicKeyInfo."""
    extensions: Mapping[str, bytes]

    @property
    def is_authority(self) -> bool:
        """Whether it may sign others: basicConstraints."""
        value = self.extensions.get("2.5.29.19")
        if value is None:
            return False
        items = read(value, "basicConstraints").expect(SEQUENCE, "basicConstraints").items()
        return bool(items) and items[0].tag == BOOLEAN and items[0].content == b"\xff"


@dataclass(frozen=True)
class RevocationList:
    """The fields of a revocation list."""

    signed: Signed
    issuer: bytes
    this_update: int
    next_update: int
    serials: frozenset[int]


def read(data: bytes, what: str) -> Value:
    """The one value that the bytes are.

    Raises:
        EvidenceError: they are none, or more than one.
    """
    if len(data) > MOST_BYTES:
        raise EvidenceError(f"{what}: {len(data):,} bytes of DER; at most {MOST_BYTES:,} are read")
    found = list(_values(data))
    if len(found) != 1:
        raise EvidenceError(f"{what}: expected one value of DER, found {len(found)}")
    return found[0]


def read_certificate(data: bytes, what: str) -> Certificate:
    """Read a certificate of X.509, version 3.

    Raises:
        EvidenceError: it is none.
    """
    signed = _read_signed(data, what)
    fields = list(signed.fields)
    if len(fields) < 7 or fields[0].tag != 0xA0:
        raise EvidenceError(f"{what}: no certificate of version 3")
    _, serial, algorithm, issuer, validity, subject, key, *others = fields
    if algorithm.whole != signed.algorithm_bytes:
        raise EvidenceError(f"{what}: two signature algorithms in one certificate")
    times = validity.expect(SEQUENCE, what).items()
    if len(times) != 2:
        raise EvidenceError(f"{what}: its validity has a beginning and an end")
    extensions = [it for it in others if it.tag == 0xA3]
    return Certificate(
        signed=signed,
        serial=integer(serial, what),
        issuer=issuer.expect(SEQUENCE, what).whole,
        subject=subject.expect(SEQUENCE, what).whole,
        common_name=_common_name(subject),
        not_before=_time(times[0], what),
        not_after=_time(times[1], what),
        public_key=key.expect(SEQUENCE, what).whole,
        extensions=_extensions(extensions[0], what) if extensions else {},
    )


def read_revocation_list(data: bytes, what: str) -> RevocationList:
    """Read a revocation list of X.509, version 2, that says when the next one comes.

    Raises:
        EvidenceError: it is none.
    """
    signed = _read_signed(data, what)
    fields = list(signed.fields)
    if len(fields) < 5 or fields[0].tag != INTEGER:
        raise EvidenceError(f"{what}: no revocation list of version 2")
    _, algorithm, issuer, this_update, next_update, *others = fields
    if algorithm.whole != signed.algorithm_bytes:
        raise EvidenceError(f"{what}: two signature algorithms in one revocation list")
    entries = others[0].items() if others and others[0].tag == SEQUENCE else []
    serials = (entry.expect(SEQUENCE, what).items() for entry in entries)
    return RevocationList(
        signed=signed,
        issuer=issuer.whole,
        this_update=_time(this_update, what),
        next_update=_time(next_update, what),
        serials=frozenset(integer(_first(items, what), what) for items in serials),
    )


def integer(value: Value, what: str) -> int:
    """An INTEGER."""
    value.expect(INTEGER, what)
    if not 1 <= len(value.content) <= 64:
        raise EvidenceError(f"{what}: an integer of {len(value.content)} bytes")
    return int.from_bytes(value.content, "big", signed=True)


def _read_signed(data: bytes, what: str) -> Signed:
    items = read(data, what).expect(SEQUENCE, what).items()
    if len(items) != 3:
        raise EvidenceError(f"{what}: expected what is signed, an algorithm and a signature")
    signed, algorithm, signature = items
    bits = signature.expect(BIT_STRING, what).content
    if not bits or bits[0]:
        raise EvidenceError(f"{what}: a signature is whole bytes")
    fields = tuple(signed.expect(SEQUENCE, what).items())
    name = _oid(_first(algorithm.expect(SEQUENCE, what).items(), what), what)
    return Signed(signed.whole, name, algorithm.whole, bits[1:], fields)


def _first(items: list[Value], what: str) -> Value:
    if not items:
        raise EvidenceError(f"{what}: an empty sequence of DER")
    return items[0]


def _extensions(value: Value, what: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for extension in _first(value.items(), what).expect(SEQUENCE, what).items():
        items = extension.expect(SEQUENCE, what).items()
        if len(items) not in (2, 3):
            raise EvidenceError(f"{what}: a malformed extension")
        name = _oid(items[0], what)
        if name in found:
            raise EvidenceError(f"{what}: the extension {name} twice")
        found[name] = items[-1].expect(OCTET_STRING, what).content
    return found


def _common_name(name: Value) -> str:
    for part in name.items():
        for attribute in part.expect(SET, "name").items():
            items = attribute.expect(SEQUENCE, "name").items()
            if len(items) == 2 and _oid(items[0], "name") == "2.5.4.3":
                return items[1].content.decode("ascii", "replace")
    return ""


def _oid(value: Value, what: str) -> str:
    content = value.expect(OID, what).content
    if not content or content[-1] & 0x80:
        raise EvidenceError(f"{what}: a malformed object identifier")
    numbers, number = [], 0
    for byte in content:
        number = number << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(number)
            number = 0
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _time(value: Value, what: str) -> int:
    """Unix seconds. Certificates say years before 2050 in two digits (RFC 5280)."""
    form = {UTC_TIME: "%y%m%d%H%M%SZ", GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}.get(value.tag)
    digits = {UTC_TIME: 13, GENERALIZED_TIME: 15}.get(value.tag)
    if form is None or len(value.content) != digits or not value.content[:-1].isdigit():
        raise EvidenceError(f"{what}: a malformed time")
    text = value.content.decode("ascii")
    if value.tag == UTC_TIME:
        text, form = ("19" if text >= "50" else "20") + text, "%Y%m%d%H%M%SZ"
    try:
        return int(datetime.strptime(text, form).replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise EvidenceError(f"{what}: a malformed time") from error


def _values(data: bytes) -> Iterator[Value]:
    """The values that lie one after another, in definite lengths of the shortest form."""
    at = 0
    while at < len(data):
        begin = at
        if len(data) - at < 2 or data[at] & 0x1F == 0x1F:
            raise EvidenceError("malformed DER: a tag")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            field = data[at : at + count]
            if not 1 <= count <= 3 or len(field) != count or field[0] == 0:
                raise EvidenceError("malformed DER: a length")
            length = int.from_bytes(field, "big")
            at += count
            if length < 0x80:
                raise EvidenceError("malformed DER: a length")
        if length > len(data) - at:
            raise EvidenceError("malformed DER: it ends inside of a value")
        yield Value(tag, data[at : at + length], data[begin : at + length])
        at += length
