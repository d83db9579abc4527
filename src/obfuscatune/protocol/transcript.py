"""A transcript: all that a worker saw, in order, as it wrote it down. Read back by the parser of the wire itself.

A folder with two files. `frames.bin`: every message exactly as it crossed the wire, one after the other; only the
session id in each HELLO is zeroed, for it is a key. Each begins at a multiple of 8 bytes, after zeros where need be, so
that a matrix can be read where it lies. `index.jsonl`: one line per run of the worker that begins or ends, and per
message where in frames.bin it lies:

    {"event": "begin", "version": 1}
    {"event": "request", "at_ns": 81, "session": "3f2a90b1c4d5", "type": "MULTIPLY", "offset": 0, "length": 1572920}
    {"event": "reply",   "at_ns": 95, "session": "3f2a90b1c4d5", "type": "PRODUCT",  "offset": 1572920, "length": 56}
    {"event": "end", "messages": 2}

`at_ns` is when the worker took the request up, or was about to send the reply: nanoseconds of its monotonic clock,
which starts anywhere. What was recorded before there were times is read as all at 0.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from obfuscatune.errors import ProtocolError, StorageError
from obfuscatune.protocol.messages import FORMS, HEADER_BYTES, REPLIES, REQUESTS, Header
from obfuscatune.protocol.tensors import bytes_of

INDEX = "index.jsonl"
FRAMES = "frames.bin"
VERSION = 1
ALIGNMENT = 8
"""Bytes: the largest element of a matrix. A header has a multiple of it."""
Direction = Literal["request", "reply"]


@dataclass(frozen=True)
class TranscriptEntry:
    """One message that a worker received or sent."""

    direction: Direction
    session: str
    """Label of the session (12 hex digits): the same for all its connections, and tells nothing of its id."""
    header: Header
    body: bytes
    """The payload, where it is no matrix."""
    tensor: torch.Tensor | None
    """The payload (rows, cols) of a STORE, a MULTIPLY, a PRODUCT or the like; on the CPU."""
    at_ns: int = 0
    """When it came or went, by the worker's monotonic clock."""


def read_transcript(folder: Path, *, allow_cut: bool = False, mapped: bool = False) -> Iterator[TranscriptEntry]:
    """All messages in order, one in memory at a time.

    Args:
        folder: what the worker was given as --record.
        allow_cut: take a transcript that stops short, as of a worker that still runs or was killed.
        mapped: leave matrices on the disk until they are used. The files may be removed then, but not changed.

    Raises:
        StorageError: the folder cannot be read as a transcript, or stops short.
        ProtocolError: a message in it breaks the protocol.
    """
    try:
        lines = (folder / INDEX).read_text().splitlines()
        with (folder / FRAMES).open("rb") as frames:
            mapping = _mapping(folder / FRAMES) if mapped else None
            yield from _entries(lines, frames, mapping, folder, allow_cut)
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the transcript in {folder}: {error}") from error


def _mapping(path: Path) -> torch.Tensor:
    """The bytes of a file, read when they are used."""
    size = path.stat().st_size
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _entries(
    lines: list[str], frames: BinaryIO, mapping: torch.Tensor | None, folder: Path, allow_cut: bool
) -> Iterator[TranscriptEntry]:
    running, count = False, 0
    for number, line in enumerate(lines, start=1):
        where = f"{folder / INDEX}, line {number}"
        record = _record(line, where)
        event = None if record is None else record["event"]
        if event in ("request", "reply") and record is not None and running:
            yield _entry(record, frames, mapping, where)
            count += 1
        elif event == "begin" and (allow_cut or not running):
            running, count = True, 0
        elif event == "end" and running and record is not None and record["messages"] == count:
            running = False
        elif record is not None or not allow_cut:
            raise StorageError(f"{where}: not what follows here; the transcript is damaged, or its worker was killed")
    if (running or not lines) and not allow_cut:
        raise StorageError(f"the transcript in {folder} has no end: its worker still runs, or was killed")


def _record(line: str, where: str) -> dict[str, Any] | None:
    """One line of the index; None for one that was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "event" not in record:
        raise StorageError(f"{where}: not a record of a transcript")
    if record["event"] == "begin" and record.get("version") != VERSION:
        raise StorageError(f"{where}: version {record.get('version')} of the format, {VERSION} is understood")
    return record


def _entry(record: dict[str, Any], frames: BinaryIO, mapping: torch.Tensor | None, where: str) -> TranscriptEntry:
    try:
        direction, session, offset, length = (record[key] for key in ("event", "session", "offset", "length"))
        at_ns = int(record.get("at_ns", 0))
        frames.seek(offset)
        header = Header.unpack(frames.read(HEADER_BYTES), expected=REQUESTS if direction == "request" else REPLIES)
        if header.payload_bytes != length - HEADER_BYTES:
            raise StorageError(f"{where}: {length} bytes, but the message has {HEADER_BYTES + header.payload_bytes}")
        if not FORMS[header.type].tensor_bytes:
            body = _exactly(frames, header.payload_bytes, where)
            return TranscriptEntry(direction, session, header, body, None, at_ns)
        tensor = _matrix(header, frames, mapping, where)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{where}: not a record of a transcript ({error})") from error
    except ProtocolError as error:
        raise type(error)(f"{where}: {error}") from error
    return TranscriptEntry(direction, session, header, b"", tensor, at_ns)


def _matrix(header: Header, frames: BinaryIO, mapping: torch.Tensor | None, where: str) -> torch.Tensor:
    """The matrix after a header that was just read."""
    dtype = header.dtype.torch_dtype
    if mapping is not None:
        start = frames.tell()
        data = mapping[start : start + header.payload_bytes]
        if start % header.dtype.itemsize:
            data = data.clone()  # no tensor begins at such an address: recorded before messages were aligned
        if len(data) == header.payload_bytes:
            return data.view(dtype).view(header.rows, header.cols)
    else:
        tensor = torch.empty(header.rows, header.cols, dtype=dtype)
        if frames.readinto(bytes_of(tensor)) == header.payload_bytes:  # type: ignore[attr-defined]
            return tensor
    raise StorageError(f"{where}: {FRAMES} ends before the message does")


def _exactly(frames: BinaryIO, size: int, where: str) -> bytes:
    data = frames.read(size)
    if len(data) != size:
        raise StorageError(f"{where}: {FRAMES} ends before the message does")
    return data
