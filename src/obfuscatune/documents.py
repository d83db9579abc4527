"""Canonical JSON, and documents that are signed: what attest, sealing, channel and service have in common.

A document is a JSON object of strings, integers, booleans, null, lists and objects. Its canonical bytes are ASCII,
keys sorted, no white space: RFC 8785 for documents without fractions, which are refused.

A signed document is `{"document": {...}, "key": <hex>, "signature": <base64>}`. The Ed25519 signature is over
`b"obfuscatune/" + purpose + b"\\0" + canonical bytes`, so that one kind of document never stands for another.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from obfuscatune.errors import IntegrityError

MOST_BYTES = 16 * 2**20
"""Of a document, unless a caller says less."""
_MOST_DEPTH = 32


def canonical(document: Any) -> bytes:
    """The one encoding of a document.

    Raises:
        ValueError: it holds something that JSON has not, or a fraction.
    """
    _check(document, 0)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def parse(data: bytes, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON object, strictly: no key twice, no fraction, no more bytes and no deeper than a document may be.

    Raises:
        IntegrityError: it is none.
    """
    if len(data) > most_bytes:
        raise IntegrityError(f"a document of {len(data):,} bytes; at most {most_bytes:,} are read")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
        _check(document, 0)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"no JSON document: {error}") from error
    if not isinstance(document, dict):
        raise IntegrityError(f"expected a JSON object, found {type(document).__name__}")
    return document


def read(path: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read the JSON object that a file holds, as `parse` does. Of a larger file no more is read than shows that.

    Raises:
        OSError: the file cannot be read.
        IntegrityError: it holds none.
    """
    with path.open("rb") as file:
        return parse(file.read(most_bytes + 1), most_bytes=most_bytes)


def has_fields(value: Any, kinds: Mapping[str, type]) -> TypeGuard[dict[str, Any]]:
    """Whether it is an object with these fields and no other, each of its very type: a bool is no int."""
    return (
        isinstance(value, dict)
        and set(value) == set(kinds)
        and all(type(value[name]) is kind for name, kind in kinds.items())
    )


def is_whole(value: Any, least: int, most: int) -> TypeGuard[int]:
    """Whether it is a whole number of that range; a bool is none."""
    return type(value) is int and least <= value <= most


def is_hex(value: Any, size: int = 32) -> TypeGuard[str]:
    """Whether it is so many bytes in lower-case hex: by default a digest, or a public key."""
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", value) is not None


def digest(document: Any) -> str:
    """SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(canonical(document)).hexdigest()


def sign(document: Mapping[str, Any], purpose: str, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The document, signed, as a document."""
    signature = key.sign(_signed_bytes(document, purpose))
    return {
        "document": dict(document),
        "key": key.public_key().public_bytes_raw().hex(),
        "signature": base64.b64encode(signature).decode(),
    }


def verify(signed: Mapping[str, Any], purpose: str, keys: "frozenset[str] | set[str]") -> dict[str, Any]:
    """The document within, if one of `keys` (Ed25519 public keys, in hex) signed it for this purpose.

    Raises:
        IntegrityError: it is no signed document, another's, or changed.
    """
    if set(signed) != {"document", "key", "signature"} or not isinstance(signed["document"], dict):
        raise IntegrityError("no signed document: it has a document, a key and a signature")
    if not isinstance(signed["key"], str) or signed["key"] not in keys:
        raise IntegrityError(f"signed by {signed['key']!r:.80}, which is none of the keys that are trusted here")
    try:
        signature = base64.b64decode(signed["signature"], validate=True)
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed["key"]))
        public.verify(signature, _signed_bytes(signed["document"], purpose))
    except (InvalidSignature, binascii.Error, ValueError, TypeError) as error:
        raise IntegrityError(f"the signature is not of this document, or not for {purpose}") from error
    return dict(signed["document"])


def _signed_bytes(document: Mapping[str, Any], purpose: str) -> bytes:
    return b"obfuscatune/" + purpose.encode() + b"\0" + canonical(dict(document))


def _check(value: Any, depth: int) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError(f"nested deeper than {_MOST_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key that is no string: {key!r}")
            _check(key, depth)
            _check(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, str):
        value.encode()  # a lone surrogate is a ValueError
    elif value is not None and not isinstance(value, bool | int):
        raise ValueError(f"{type(value).__name__}: documents hold strings, integers, booleans, null, lists and objects")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one key twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of a document")
