"""Operators, workers' certificates and lists for the tests of this folder."""

from __future__ import annotations

import functools
import json
from typing import Any

from obfuscatune.fleet.members import Member
from obfuscatune.protocol.authority import check_issued, issue, load_authority, load_one, make_authority, make_request


@functools.cache
def operator(name: str) -> tuple[bytes, bytes]:
    """Its authority's certificate and key."""
    return make_authority(name)


@functools.cache
def certificate(number: int, name: str = "cloud-a") -> bytes:
    """Of that operator's worker of that number."""
    return issue(make_request("worker")[0], f"{name} worker {number}", *operator(name))


def accepts(name: str) -> Any:
    """A policy: that operator's workers, and nobody else."""
    issuer = load_authority(operator(name)[0])
    return lambda member: check_issued(load_one(member.certificate), issuer)


def entry(number: int = 0, name: str = "cloud-a", **changes: Any) -> dict[str, Any]:
    """A member as a list has it. A change to `...` leaves the field out."""
    fields = {
        "address": f"tcp:127.0.0.1:{7600 + number}",
        "certificate": certificate(number, name).decode(),
        "operator": name,
        "party": "compute",
        "memory": 2**30,
        "device": "cpu",
    } | changes
    return {key: value for key, value in fields.items() if value is not ...}


def document(*entries: Any) -> bytes:
    return json.dumps({"version": 1, "members": list(entries)}).encode()


def member(number: int, name: str = "cloud-a") -> Member:
    return Member(f"tcp:127.0.0.1:{7600 + number}", certificate(number, name), name, "compute", 2**30)
