"""JSON Lines, read strictly: every fault is a DataError that names file and line."""

import hashlib
import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from obfuscatune.wire.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is refused: it is a wrong file, or line breaks have been lost."""


class Line(NamedTuple):
    """One JSON object and where it stood."""

    where: str
    """`FILE:LINE`, for messages; lines count from 1."""
    fields: dict[str, Any]


def read_jsonl(path: Path) -> Iterator[Line]:
    """Yield the objects of a JSON Lines file in order. Lines of white space alone are passed over.

    Lines end at LF or CRLF only: U+2028 and its kin are ordinary characters inside a JSON string.

    Raises:
        DataError: no such file, not UTF-8, malformed JSON, a repeated key, NaN or infinity, an unpaired
            surrogate, a value that is no object, a line over `MAX_LINE_BYTES`, or no object at all.
    """
    found = False
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}:{number}"
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes")
                if raw.strip():
                    found = True
                    yield Line(where, _parse_object(where, raw))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(f"{path}: the file holds no record; expected one JSON object a line")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse_object(where: str, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: byte {error.start + 1} of the line is {raw[error.start]:#04x}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")  # as json ends some of its messages, before the position
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {reason}") from error
    except RecursionError as error:
        raise DataError(f"{where}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # from the two hooks below, and from integers of thousands of digits
        raise DataError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {json_type(value)}")
    if "\\u" in text:
        _refuse_surrogates(where, value)
    return value


def field_faults(line: Line, required: Set[str], optional: Set[str] = frozenset()) -> str:
    """Which fields are missing and which are unknown: "missing a; unknown b, c", or nothing."""
    missing, unknown = required - line.fields.keys(), line.fields.keys() - required - optional
    found = (("missing", missing), ("unknown", unknown))
    return "; ".join(f"{word} {', '.join(sorted(names))}" for word, names in found if names)


def text_of(line: Line, name: str, value: object) -> str:
    """The value of the field `name`, which must be a string of more than white space.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{line.where}: {name} must be a string, found {json_type(value)}")
    if not value.strip():
        raise DataError(f"{line.where}: {name} is empty")
    return value


def json_type(value: object) -> str:
    """The JSON name of a decoded value's type, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refuse_surrogates(where: str, fields: dict[str, Any]) -> None:
    """An escape such as "\\ud800" alone decodes to a str that is no text; no tokenizer takes it."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a \\u escape names half of a surrogate pair, which is no character") from error
