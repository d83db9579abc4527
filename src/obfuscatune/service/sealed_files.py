"""A run directory whose files are sealed: whoever owns the disk reads nothing of a run, and changes nothing unnoticed.

A file is a sequence of records, each `length (4 bytes, big-endian) || sealed blob`; the blob's name is the file's path
and the record's number. A file that is written whole is one record, one that is appended to has one for each addition.
Where a directory is put in place, its files are sealed for the path that they will have.

Not noticed is that a file, whole, was replaced by an older one of the same path, or that the last records of a file
that is appended to are gone: what makes a checkpoint says itself of which step it is.
"""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from obfuscatune.errors import IntegrityError, StorageError
from obfuscatune.sealing.blobs import open_blob, seal_blob
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.training.storage import RunDirectory

_LENGTH = struct.Struct(">I")
PURPOSE = "run"
MOST_RECORD_BYTES = 2**31


class SealedDirectory(RunDirectory):
    """As `RunDirectory`, with contents sealed by one key."""

    def __init__(
        self, root: Path, key: SecretBytes, name: str, on_directory: Callable[[str], None] = lambda _: None
    ) -> None:
        """
        Args:
            name: tells this directory from others under the same key.
            on_directory: called with the name of each directory that was put in place.

        Raises:
            StorageError: it cannot be made.
        """
        super().__init__(root)
        self._key, self._name, self._on_directory = key, name, on_directory
        self._records: dict[str, int] = {}

    def read(self, name: str) -> bytes:
        """See `RunDirectory`. A record that was not written to its end is left out.

        Raises:
            StorageError: it cannot be read, or is not what was written.
        """
        return b"".join(self._opened(name, super().read(name)))

    def write_file(self, name: str, content: bytes) -> None:
        """See `RunDirectory`."""
        super().write_file(name, self._record(name, 0, content))
        self._records[name] = 1

    def append(self, name: str, content: bytes) -> None:
        """See `RunDirectory`."""
        if name not in self._records:  # what a killed process left in part must not stand before it
            self.write_file(name, self.read(name) if (self.root / name).exists() else b"")
        super().append(name, self._record(name, self._records[name], content))
        self._records[name] += 1

    def write_directory(self, name: str, files: Mapping[str, bytes]) -> None:
        """See `RunDirectory`."""
        sealed = {file: self._record(f"{name}/{file}", 0, content) for file, content in files.items()}
        super().write_directory(name, sealed)
        self._on_directory(name)

    def _record(self, name: str, number: int, content: bytes) -> bytes:
        sealed = seal_blob(self._key, content, purpose=PURPOSE, name=self._place(name, number))
        return _LENGTH.pack(len(sealed)) + sealed

    def _opened(self, name: str, stored: bytes) -> list[bytes]:
        found: list[bytes] = []
        at = 0
        while at + _LENGTH.size <= len(stored):
            (length,) = _LENGTH.unpack_from(stored, at)
            end = at + _LENGTH.size + length
            if length > MOST_RECORD_BYTES or (end > len(stored) and not found):
                raise StorageError(f"{self.root / name}: damaged: a record is cut off")
            if end > len(stored):
                break  # an addition that a killed process left in part
            sealed = stored[at + _LENGTH.size : end]
            try:
                content = open_blob(self._key, sealed, purpose=PURPOSE, name=self._place(name, len(found)))
            except IntegrityError as error:
                raise StorageError(f"{self.root / name}: damaged, or not written by this run: {error}") from error
            found.append(content)
            at = end
        return found

    def _place(self, name: str, number: int) -> str:
        return f"{self._name}/{name}/{number}"
