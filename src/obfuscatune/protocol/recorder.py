"""Writes down all that a worker or a device sees. `protocol/transcript.py` has the format, and reads it back."""

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from obfuscatune.errors import StorageError
from obfuscatune.protocol.messages import HEADER_BYTES, Header
from obfuscatune.protocol.transcript import ALIGNMENT, FRAMES, INDEX, VERSION, Direction
from obfuscatune.protocol.transport import Buffer


class Recorder:
    """Appends messages to a transcript, from any thread, in one order.

    After the first failure nothing more is recorded and every call raises: a worker that cannot record must stop, for
        what it leaves must not pass for the whole.
    """

    def __init__(self, folder: Path) -> None:
        """Open or continue the transcript in `folder`, readable by this user alone.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._messages = 0
        self._failure: StorageError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._frames = _open(folder / FRAMES)
            self._index = _open(folder / INDEX)
            self._end_cut_line()
        except OSError as error:
            raise self._failed(error) from error
        self._write_index({"event": "begin", "version": VERSION})

    def record(self, direction: Direction, session: str, header: Header, payload: Buffer) -> None:
        """Write one message down, before it is acted upon (request) or sent (reply).

        Raises:
            StorageError: the disk refused, now or before.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                at_ns = time.monotonic_ns()
                end = os.lseek(self._frames, 0, os.SEEK_END)
                offset = end + -end % ALIGNMENT
                _write_all(self._frames, [bytes(offset - end), header.pack(), payload])
                record = {"at_ns": at_ns, "session": session, "type": header.type.name, "offset": offset}
                self._write_index({"event": direction, **record, "length": HEADER_BYTES + len(payload)})
            except OSError as error:
                raise self._failed(error) from error
            self._messages += 1

    @property
    def failed(self) -> bool:
        """Whether something is missing from the transcript."""
        return self._failure is not None

    def close(self) -> None:
        """Write the end, unless something failed before.

        Raises:
            StorageError: the disk refused.
        """
        with self._lock:
            if self._failure is None:
                self._write_index({"event": "end", "messages": self._messages})
            self._failure = StorageError("the transcript is closed")
            os.close(self._frames)
            os.close(self._index)

    def _write_index(self, record: dict[str, Any]) -> None:
        try:
            _write_all(self._index, [json.dumps(record).encode() + b"\n"])
        except OSError as error:
            raise self._failed(error) from error

    def _end_cut_line(self) -> None:
        """A worker that was killed may have left half a line: the next record begins on a new one."""
        size = os.lseek(self._index, 0, os.SEEK_END)
        if size and os.pread(self._index, 1, size - 1) != b"\n":
            _write_all(self._index, [b"\n"])

    def _failed(self, error: OSError) -> StorageError:
        reason = "a symbolic link lies there, which is not followed" if error.errno == errno.ELOOP else error.strerror
        self._failure = StorageError(f"cannot record to {self._folder}: {reason}; the transcript is incomplete")
        return self._failure


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _write_all(descriptor: int, buffers: list[Buffer]) -> None:
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            view = view[os.write(descriptor, view) :]
