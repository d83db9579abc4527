"""An upload as a browser sends it (RFC 7578), streamed into memory: of an owner's file nothing lies on disk in clear.

The framework's own reader is not used, because it writes what is large into temporary files.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from obfuscatune.service.api.errors import ApiError

MOST_FIELD_BYTES = 4096
MOST_PARTS = 16
MOST_HEADER_BYTES = 4096


@dataclass
class Upload:
    """The fields, and the file of the field `file` in a memory file that is closed with this object."""

    fields: dict[str, str]
    filename: str | None = None
    descriptor: int = -1
    size: int = 0

    @property
    def path(self) -> str:
        """Where this process reads the file's content."""
        return f"/proc/self/fd/{self.descriptor}"

    def content(self) -> bytes:
        """The file's content."""
        return os.pread(self.descriptor, self.size, 0) if self.size else b""

    def close(self) -> None:
        """Forget the content."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)
    header_bytes: int = 0


class _Reader:
    """Follows the parser through one body."""

    def __init__(self, boundary: bytes, most_bytes: int) -> None:
        self.upload = Upload({})
        self._most, self._parts, self._part = most_bytes, 0, _Part()
        self._header, self._value, self.is_complete = bytearray(), bytearray(), False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._add(self._header, data[start:end]),
                "on_header_value": lambda data, start, end: self._add(self._value, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise ApiError(400, f"A form has at most {MOST_PARTS} parts.")
        self._part = _Part()

    def _add(self, buffer: bytearray, data: bytes) -> None:
        self._part.header_bytes += len(data)
        if self._part.header_bytes > MOST_HEADER_BYTES:
            raise ApiError(400, "The headers of a part of the form are too long.")
        buffer += data

    def _end_header(self) -> None:
        # Latin-1 keeps each byte as it is, for `parse_options_header`, which makes bytes of it again.
        self._part.headers[self._header.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        part = self._part
        kind, options = parse_options_header(part.headers.get("content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise ApiError(400, "A part of the form has no name.")
        part.name = options[b"name"].decode("utf-8", "replace")
        part.is_file = part.name == "file"
        if not part.is_file:
            if part.name in self.upload.fields:
                raise ApiError(400, f"The field {part.name[:64]} is given twice.")
            return
        if self.upload.descriptor >= 0:
            raise ApiError(400, "The form has two files.", param="file")
        self.upload.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        self.upload.descriptor = os.memfd_create("upload", os.MFD_CLOEXEC)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._part.is_file:
            if len(self._part.value) + end - start > MOST_FIELD_BYTES:
                raise ApiError(400, f"The field {self._part.name[:64]} is too long.", param=self._part.name[:64])
            self._part.value += data[start:end]
            return
        self.upload.size += end - start
        if self.upload.size > self._most:
            raise ApiError(413, f"A file has at most {self._most} bytes.", param="file", code="file_too_large")
        view = memoryview(data)[start:end]
        while view:
            view = view[os.write(self.upload.descriptor, view) :]

    def _end(self) -> None:
        if not self._part.is_file:
            self.upload.fields[self._part.name] = self._part.value.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.is_complete = True


async def read_upload(content_type: str, body: AsyncIterator[bytes], *, most_bytes: int) -> Upload:
    """Read a form with a file.

    Args:
        content_type: the header; it names the boundary.
        most_bytes: of the file.

    Raises:
        ApiError: it is none, or larger.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise ApiError(400, "Expected multipart/form-data with the fields purpose and file.")
    reader = _Reader(boundary, most_bytes)
    try:
        async for chunk in body:
            reader.parser.write(chunk)
            await asyncio.sleep(0)  # a body that is there at once must not keep others waiting
        reader.parser.finalize()
        if not reader.is_complete:
            raise ApiError(400, "The form ends in the middle of a part.")
    except MultipartParseError as error:
        reader.upload.close()
        raise ApiError(400, "The form is no valid multipart/form-data.") from error
    except BaseException:
        reader.upload.close()
        raise
    return reader.upload
