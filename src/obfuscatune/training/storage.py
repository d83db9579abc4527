"""A run directory on disk. All of tuning's writing happens here; a disk that refuses is a StorageError.

The directory may lie where others can write, or be one that somebody else made. So below it no symbolic link is
followed: each path is opened folder by folder, and what is found under another's link is never written to, nor read.
"""

import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.protocol.files import lock, sync

_UNFINISHED = ".unfinished-"
_DISCARDED = ".discarded-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: at once, were it a pipe
log = logging.getLogger(__name__)


class RunDirectory:
    """Files that are whole or absent, whenever the process is killed and whenever the power fails."""

    def __init__(self, root: Path) -> None:
        """Make the directory if it is missing, for its owner alone: adapters and losses speak of private text.

        Raises:
            StorageError: it cannot be made.
        """
        self.root = root
        with self._storage_errors(""):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. The lock goes with the process, however it ends.

        Raises:
            ConfigError: another process holds it.
            StorageError: the lock file cannot be opened.
        """
        with self._storage_errors(".lock"), self._folder_of(".lock") as (folder, name):
            descriptor = _open(name, os.O_RDWR | os.O_CREAT, folder)
        with os.fdopen(descriptor, "r+b") as file:
            self._lock(file.fileno())
            yield

    def _lock(self, descriptor: int) -> None:
        try:
            if not lock(descriptor):
                log.warning("%s: this file system has no locks: see that no other run writes here", self.root)
        except BlockingIOError:
            raise ConfigError(f"{self.root}: another run is writing here; choose another --out") from None
        except OSError as error:
            raise StorageError(f"{self.root / '.lock'}: the disk refused: {error.strerror}") from error

    def clean(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        with self._storage_errors(""):
            for _, folders, files, folder in os.fwalk(self.root):
                for name in [*folders, *files]:
                    if name.startswith((_UNFINISHED, _DISCARDED)):
                        _remove(name, folder)
                folders[:] = [name for name in folders if not name.startswith((_UNFINISHED, _DISCARDED))]

    def read(self, name: str) -> bytes:
        """The contents of a file.

        Raises:
            StorageError: it cannot be read.
        """
        with (
            self._storage_errors(name),
            self._folder_of(name) as (folder, last),
            os.fdopen(_open(last, os.O_RDONLY, folder), "rb") as file,
        ):
            return file.read()

    def write_file(self, name: str, content: bytes) -> None:
        """Put a file in place, or replace it, in one instant.

        Raises:
            StorageError: the disk refused; the old file, if there was one, is as it was.
        """
        with self._storage_errors(name), self._folder_of(name, make=True) as (folder, last):
            unfinished = _UNFINISHED + last
            try:
                _remove(unfinished, folder)
                _write_durably(unfinished, content, folder)
                os.replace(unfinished, last, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    _remove(unfinished, folder)
                raise
            sync(folder)

    def remove_file(self, name: str) -> None:
        """Remove a file; one that is not there is fine.

        Raises:
            StorageError: the disk refused.
        """
        with self._storage_errors(name), self._folder_of(name) as (folder, last):
            _remove(last, folder)

    def append(self, name: str, content: bytes) -> None:
        """Add to a file's end. After a kill, the last addition may be missing or in part.

        Raises:
            StorageError: the disk refused.
        """
        with (
            self._storage_errors(name),
            self._folder_of(name) as (folder, last),
            os.fdopen(_open(last, os.O_WRONLY | os.O_APPEND | os.O_CREAT, folder), "ab") as file,
        ):
            file.write(content)

    def write_directory(self, name: str, files: Mapping[str, bytes]) -> None:
        """Put a directory of files in place in one instant; one of that name is replaced.

        Raises:
            StorageError: the disk refused; what was there is as it was.
        """
        with self._storage_errors(name), self._folder_of(name, make=True) as (parent, last):
            unfinished = _UNFINISHED + last
            try:
                _remove(unfinished, parent)
                os.mkdir(unfinished, dir_fd=parent)
                with _opened(unfinished, parent) as folder:
                    for file_name, content in files.items():
                        _write_durably(file_name, content, folder)
                    sync(folder)
            except OSError:
                with suppress(OSError):
                    _remove(unfinished, parent)
                raise
            _discard(last, parent)
            os.rename(unfinished, last, src_dir_fd=parent, dst_dir_fd=parent)
            sync(parent)

    def remove_directory(self, name: str) -> None:
        """Remove a directory: under its name it is there whole, or not at all.

        Raises:
            StorageError: the disk refused, or there is none.
        """
        with self._storage_errors(name), self._folder_of(name) as (parent, last):
            os.stat(last, dir_fd=parent, follow_symlinks=False)
            _discard(last, parent)

    @contextmanager
    def _folder_of(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The folder in which `name` lies, opened, and the last part of `name`."""
        *folders, last = PurePosixPath(name).parts
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=descriptor)
                inner = os.open(folder, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor, last
        finally:
            os.close(descriptor)

    @contextmanager
    def _storage_errors(self, name: str) -> Iterator[None]:
        path = self.root / name
        try:
            yield
        except OSError as error:
            links = [parent for parent in (path, *path.parents) if parent != self.root and parent.is_symlink()]
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and links:
                raise StorageError(
                    f"{links[0]} is a symbolic link, which is not followed: it may lead to another's file; remove it"
                ) from error
            raise StorageError(f"{path}: the disk refused: {error.strerror or error}") from error


@contextmanager
def _opened(name: str, parent: int) -> Iterator[int]:
    descriptor = os.open(name, _FOLDER, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, folder: int) -> int:
    """A regular file, or a new one."""
    descriptor = os.open(name, flags | _FILE, 0o666, dir_fd=folder)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    wrong = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
    raise OSError(wrong, os.strerror(wrong) if stat.S_ISDIR(kind) else "this is no regular file")


def _write_durably(name: str, content: bytes, folder: int) -> None:
    with os.fdopen(_open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder), "wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def _discard(name: str, parent: int) -> None:
    """Take what has that name, if there is such a thing, out of sight in one instant, and remove it."""
    discarded = _DISCARDED + name
    _remove(discarded, parent)
    with suppress(FileNotFoundError):
        os.rename(name, discarded, src_dir_fd=parent, dst_dir_fd=parent)
    _remove(discarded, parent)


def _remove(name: str, folder: int) -> None:
    """A file, a link (not what it leads to), or a directory with all in it; nothing is fine too."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)
