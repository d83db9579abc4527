"""The kinds of records, and strict readers of JSON Lines and JSON arrays.

A record is running text, a prompt with its completion, or a conversation. Every fault in a file is a DataError that
names the file and the line.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from obfuscatune.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Text:
    """Running text. The loss counts every token."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion. The loss counts only the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        details: other fields for the chat template: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
        trained: False excludes the turn from the loss. The loss never counts turns of other roles than the assistant.
    """

    role: str
    content: str
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trained: bool = True

    @property
    def is_trained(self) -> bool:
        """Whether the loss counts this turn: it is the assistant's, and not excluded."""
        return self.trained and self.role == "assistant"

    def fields(self) -> dict[str, Any]:
        """The message as a dict for a chat template."""
        return {"role": self.role, "content": self.content, **self.details}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools that the assistant may call, as JSON schemas. The loss counts at least one turn."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


Record = Text | Completion | Conversation


def split_turns(conversation: Conversation) -> Iterator[Conversation]:
    """Yield one conversation for each turn in the loss. It ends with that turn, and its loss counts no other turn."""
    for index, message in enumerate(conversation.messages):
        if message.is_trained:
            before = tuple(replace(earlier, trained=False) for earlier in conversation.messages[:index])
            yield replace(conversation, messages=(*before, message))


MAX_LINE_BYTES = 16 * 2**20
"""A longer line is refused: the file is a wrong one, or has lost its line breaks."""
MAX_ARRAY_BYTES = 2**30
"""A larger JSON array is refused, since an array is read as a whole."""
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PEEKED_BYTES = 4096
_SPACE = " \t\r\n"


class Line(NamedTuple):
    """One JSON object, and its place `FILE:LINE` for error messages; lines count from 1."""

    where: str
    fields: dict[str, Any]


def read_jsonl(path: Path) -> Iterator[Line]:
    """Yield the objects of a JSON Lines file in order. Blank lines and a byte order mark at the start are skipped.

    Lines end at LF or CRLF only: other Unicode line breaks, such as U+2028, may be part of a JSON string.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or has no object; a line is longer than `MAX_LINE_BYTES`,
            is malformed JSON or no object, or has a repeated key, NaN, infinity or an unpaired surrogate.
    """
    found = False
    with opened(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                raw = _without_bom(path, raw)
            if raw.strip():
                found = True
                yield parse_jsonl_line(where, raw)
    if not found:
        raise DataError(f"{path}: the file holds no record; expected one JSON object a line")


def parse_jsonl_line(where: str, raw: bytes) -> Line:
    """The object of one line that is not blank.

    Args:
        where: What errors call the line.

    Raises:
        DataError: as `read_jsonl`.
    """
    text = _decoded(where, raw)
    with _parsing(where):
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    return _line(where, value, text)


def is_json_array(path: Path) -> bool:
    """Whether a file is a JSON array and not JSON Lines: its first character besides white space is "[".

    Raises:
        DataError: the file cannot be read.
    """
    with opened(path) as file:
        return file.read(_PEEKED_BYTES).removeprefix(_BOM).lstrip().startswith(b"[")


def read_json_array(path: Path) -> Iterator[Line]:
    """Yield the objects of a file that is one JSON array, in order, each with the line on which it begins.

    Raises:
        DataError: as `read_jsonl`; the file is not an array, or larger than `MAX_ARRAY_BYTES`.
    """
    text = _read_whole(path, MAX_ARRAY_BYTES, "; give it as JSON Lines, one object a line")
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"{path}: expected a JSON array of objects; a file of one object a line is to be named .jsonl")
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    line, counted = 1, 0
    at = _after_space(text, at + 1)
    if text[at : at + 1] == "]":
        raise DataError(f"{path}: the file holds no record; expected a JSON array of objects")
    while True:
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        with _parsing(where, path):
            value, end = decoder.raw_decode(text, at)
        yield _line(where, value, text[at:end])
        at = _after_space(text, end)
        separator = text[at : at + 1]
        if separator == "]" and not text[at + 1 :].strip(_SPACE):
            return
        if separator != ",":
            raise DataError(f"{where}: malformed JSON: expected a comma or the array's end after this record")
        at = _after_space(text, at + 1)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading bytes.

    Raises:
        DataError: the file cannot be opened, or a read fails within the `with`.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark; line ends become LF.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is larger than `MAX_LINE_BYTES`.
    """
    return _read_whole(path, MAX_LINE_BYTES).replace("\r\n", "\n").replace("\r", "\n")


def _read_whole(path: Path, most: int, advice: str = "") -> str:
    """Read a UTF-8 file of at most `most` bytes, without its byte order mark. `advice` ends the message if larger."""
    with opened(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise DataError(f"{path}: larger than {most} bytes{advice}")
    return _decoded(str(path), _without_bom(path, raw))


def _without_bom(path: Path, start: bytes) -> bytes:
    for mark, name in _OTHER_BOMS.items():
        if start.startswith(mark):
            raise DataError(f"{path}: encoded in {name}; save it as UTF-8")
    return start.removeprefix(_BOM)


def _decoded(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        place = where if line == 1 else f"{where}:{line}"
        column = error.start - line_start + 1
        raise DataError(f"{place}: not UTF-8: byte {column} of the line is {raw[error.start]:#04x}") from error


@contextmanager
def _parsing(where: str, path: Path | None = None) -> Iterator[None]:
    """Turn the JSON decoder's errors into a DataError. With `path`, the decoder's line numbers are the file's own."""
    try:
        yield
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")  # as json ends some of its messages, before the position
        place = where if path is None else f"{path}:{error.lineno}"
        raise DataError(f"{place}: malformed JSON at column {error.colno}: {reason}") from error
    except RecursionError as error:
        raise DataError(f"{where}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # from the decoder's two hooks, and from integers of thousands of digits
        raise DataError(f"{where}: malformed JSON: {error}") from error


def _line(where: str, value: Any, text: str) -> Line:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {json_type(value)}")
    if "\\u" in text:
        _refuse_surrogates(where, value)
    return Line(where, value)


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in _SPACE and at < len(text):
        at += 1
    return at


def field_faults(line: Line, required: Set[str], optional: Set[str] = frozenset()) -> str:
    """Describes missing and unknown fields as "missing a; unknown b, c"; empty if there are none."""
    missing, unknown = required - line.fields.keys(), line.fields.keys() - required - optional
    found = (("missing", missing), ("unknown", unknown))
    return "; ".join(f"{word} {', '.join(sorted(names))}" for word, names in found if names)


def text_of(line: Line, name: str, value: object) -> str:
    """Returns `value`, of the field `name`, if it is a string that is not blank.

    Raises:
        DataError: `value` is not a string, or blank.
    """
    if not isinstance(value, str):
        raise DataError(f"{line.where}: {name} must be a string, found {json_type(value)}")
    if not value.strip():
        raise DataError(f"{line.where}: {name} is empty")
    return value


def json_type(value: object) -> str:
    """The JSON type of a decoded value, with its article: "an object", "a number"."""
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
    """Refuse an unpaired escape such as "\\ud800": it decodes to a str that no tokenizer accepts."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a \\u escape names half of a surrogate pair, which is no character") from error
