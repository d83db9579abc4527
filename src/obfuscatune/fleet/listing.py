"""A fleet's list, `fleet.json`: what operators publish and enclaves read as an enemy's words.

    {"version": 1, "members": [{"address": "tcp:10.0.0.7:7600", "certificate": "-----BEGIN CERTIFICATE-----…",
                                "operator": "cloud-a", "party": "compute", "memory": 42949672960, "device": "cuda"}]}

`memory` (bytes for matrices) and `device` may be left out or null. Nothing else may be there. An address is always
`tcp:`, with a port: what comes over a network names no file, socket or device of the reader's machine.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune import documents
from obfuscatune.errors import ConfigError, DiscoveryError, IntegrityError
from obfuscatune.fleet.members import Member
from obfuscatune.protocol.addresses import TcpAddress, parse_address
from obfuscatune.protocol.authority import load_one
from obfuscatune.protocol.certificates import key_digest

VERSION = 1
MAX_LIST_BYTES = 4 * 2**20
"""Of a list: `MAX_MEMBERS` of them take about 1 MB."""
MAX_MEMBERS = 1024
MAX_MEMORY_BYTES = 2**50
"""Of one worker; a petabyte is more than any has."""
_NEEDED = {"address", "certificate", "operator", "party"}
_OPTIONAL = {"memory", "device"}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:_-]{0,251}[A-Za-z0-9])?")
_OPERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def parse_list(data: bytes) -> tuple[Member, ...]:
    """The members that a list names, in its order. None of them is trusted yet.

    Raises:
        DiscoveryError: the list is malformed, empty or too long, or one key or address is there twice.
    """
    try:
        document = documents.parse(data, most_bytes=MAX_LIST_BYTES)
    except IntegrityError as error:
        raise DiscoveryError(f"the list of the fleet is malformed: {error}") from error
    if set(document) != {"version", "members"} or type(document["version"]) is not int:
        raise DiscoveryError("the list of the fleet is malformed: expected an object of version and members alone")
    if document["version"] != VERSION:
        raise DiscoveryError(
            f"the list of the fleet has another version than {VERSION}: install the same on both sides"
        )
    entries = document["members"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_MEMBERS:
        raise DiscoveryError(f"the list of the fleet is malformed: expected 1 to {MAX_MEMBERS} members")
    members: list[Member] = []
    seen: set[str | bytes] = set()
    for number, entry in enumerate(entries):
        try:
            member, key = _member(entry)
        except (ValueError, ConfigError) as error:
            raise DiscoveryError(f"the list of the fleet is malformed: member {number}: {error}") from None
        if not seen.isdisjoint({member.address, key}):
            raise DiscoveryError(
                f"the list of the fleet is malformed: member {number}: its address or key is there twice"
            )
        seen |= {member.address, key}
        members.append(member)
    return tuple(members)


def format_list(members: Sequence[Member], devices: Sequence[str | None]) -> bytes:
    """The list of `members` as bytes; `parse_list` reads it back.

    Args:
        devices: What each computes on, as "cuda"; None where that is not known.

    Raises:
        DiscoveryError: a list that enclaves would refuse.
    """
    entries = [
        {
            "address": it.address,
            "certificate": (it.certificate or b"").decode("ascii"),
            "operator": it.operator,
            "party": it.party,
            "memory": it.memory,
            "device": device,
        }
        for it, device in zip(members, devices, strict=True)
    ]
    data = json.dumps({"version": VERSION, "members": entries}, indent=1).encode() + b"\n"
    parse_list(data)
    return data


def merge_lists(lists: Sequence[bytes]) -> bytes:
    """One list of the members of several, as an enclave takes that works with two operators.

    Raises:
        DiscoveryError: one of them is malformed, or they have an address or a key in common.
    """
    for data in lists:
        parse_list(data)
    entries = [entry for data in lists for entry in documents.parse(data)["members"]]
    merged = json.dumps({"version": VERSION, "members": entries}, indent=1).encode() + b"\n"
    parse_list(merged)
    return merged


def check_operator(name: str) -> str:
    """The name itself, if it can be an operator's.

    Raises:
        ConfigError: it cannot.
    """
    if not _OPERATOR.fullmatch(name):
        raise ConfigError("an operator's name has 1 to 40 letters, digits, dots, dashes or underscores")
    return name


def _member(entry: Any) -> tuple[Member, bytes]:
    """One entry, and the digest of its key."""
    if not isinstance(entry, dict) or not _NEEDED <= set(entry) <= _NEEDED | _OPTIONAL:
        raise ValueError(
            f"expected an object of {', '.join(sorted(_NEEDED))}, and at most {', '.join(sorted(_OPTIONAL))}"
        )
    for name in _NEEDED:
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} is no string")
    address = parse_address(entry["address"][:512])
    if not isinstance(address, TcpAddress) or not address.port or not _HOST.fullmatch(address.host):
        raise ValueError("its address is not tcp:HOST:PORT")
    certificate, key = _certificate(entry["certificate"])
    party, memory, device = entry["party"], entry.get("memory"), entry.get("device")
    if party not in ("compute", "mask"):
        raise ValueError("its party is neither compute nor mask")
    if memory is not None and (type(memory) is not int or not 1 <= memory <= MAX_MEMORY_BYTES):
        raise ValueError(f"its memory is not a number of bytes from 1 to {MAX_MEMORY_BYTES}")
    if device is not None and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise ValueError("its device is neither cpu nor cuda")
    operator = check_operator(entry["operator"])
    return Member(str(address), certificate, operator, party, memory), key


def _certificate(text: str) -> tuple[bytes, bytes]:
    """A certificate in the one encoding that is accepted, and the digest of its key."""
    try:
        pem = text.encode("ascii")
        certificate = load_one(pem)
        if certificate.public_bytes(Encoding.PEM) != pem:
            raise ValueError
        return pem, key_digest(certificate)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ValueError("its certificate is not exactly one, in PEM, with a key that is known here") from None
