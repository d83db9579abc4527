"""A run directory on disk. All of tuning's writing happens here; a disk that refuses is a StorageError."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.wire.errors import ConfigError, StorageError

_UNFINISHED = ".unfinished-"
_DISCARDED = ".discarded-"


class RunDirectory:
    """Files that are whole or absent, whenever the process is killed and whenever the power fails."""

    def __init__(self, root: Path) -> None:
        """Make the directory if it is missing, for its owner alone: adapters and losses speak of private text.

        Raises:
            StorageError: it cannot be made.
        """
        self.root = root
        with _storage_errors(root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. The lock goes with the process, however it ends.

        Raises:
            ConfigError: another process holds it.
            StorageError: the lock file cannot be opened.
        """
        path = self.root / ".lock"
        with _storage_errors(path):
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.root}: another run is writing here; choose another --out") from None
            yield

    def clean(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        for path in [*self.root.glob(f"**/{_UNFINISHED}*"), *self.root.glob(f"**/{_DISCARDED}*")]:
            with _storage_errors(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read(self, name: str) -> bytes:
        """The contents of a file.

        Raises:
            StorageError: it cannot be read.
        """
        with _storage_errors(self.root / name):
            return (self.root / name).read_bytes()

    def write_file(self, name: str, content: bytes) -> None:
        """Put a file in place, or replace it, in one instant.

        Raises:
            StorageError: the disk refused; the old file, if there was one, is as it was.
        """
        path = self.root / name
        unfinished = path.with_name(_UNFINISHED + path.name)
        with _storage_errors(path):
            try:
                _write_durably(unfinished, content)
                unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)

    def append(self, name: str, content: bytes) -> None:
        """Add to a file's end. After a kill, the last addition may be missing or in part.

        Raises:
            StorageError: the disk refused.
        """
        with _storage_errors(self.root / name), (self.root / name).open("ab") as file:
            file.write(content)

    def write_directory(self, name: str, files: Mapping[str, bytes]) -> None:
        """Put a directory of files in place in one instant; one of that name is replaced.

        Raises:
            StorageError: the disk refused; what was there is as it was.
        """
        path = self.root / name
        unfinished = path.with_name(_UNFINISHED + path.name)
        with _storage_errors(path):
            try:
                unfinished.mkdir(parents=True)
                for file_name, content in files.items():
                    _write_durably(unfinished / file_name, content)
                _sync_directory(unfinished)
            except OSError:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        if path.exists():
            self.remove_directory(name)
        with _storage_errors(path):
            unfinished.rename(path)
            _sync_directory(path.parent)

    def remove_directory(self, name: str) -> None:
        """Remove a directory: under its name it is there whole, or not at all.

        Raises:
            StorageError: the disk refused.
        """
        path = self.root / name
        discarded = path.with_name(_DISCARDED + path.name)
        with _storage_errors(path):
            path.rename(discarded)
            shutil.rmtree(discarded)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """A rename is on disk only once its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: the disk refused: {error.strerror or error}") from error
