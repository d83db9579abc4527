"""Where bundles lie. Untrusted: it may answer a read with anything, and no read takes more than was asked for.

A bundle's objects are `manifest` and `chunks/<SHA-256 in hex>`. A path is a folder on this machine; a URL such as
`s3://bucket/llama` is opened by fsspec.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import unquote, urlsplit

from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.protocol.files import write_new

MANIFEST = "manifest"
CHUNKS = "chunks"
PROTOCOLS = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf", "http", "https", "webhdfs")
"""Of URLs. Others of fsspec are left out since they read other URLs that they find in what they read, render templates,
or open what is on this machine; so are URLs that are chained by `::`."""
_PIECE_BYTES = 2**20
_T = TypeVar("_T")
_CHANGED = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
"""What opening an object fails with where it is no regular file in a folder."""


class Storage(Protocol):
    """Objects by name. Methods may be called by several threads."""

    def create(self) -> None:
        """Take the place for a new bundle, which nobody else may have taken. Raises StorageError: it is not empty."""

    def write_chunk(self, name: str, contents: memoryview) -> None:
        """Store a chunk. Raises StorageError: the storage refused."""

    def write_manifest(self, contents: bytes) -> None:
        """Store the manifest, whole or not at all. Raises StorageError: the storage refused, or it has one."""

    def remove(self, chunks: Set[str]) -> None:
        """Remove the chunks of a bundle that was not finished, as far as it goes."""

    def read(self, name: str, most: int) -> bytes:
        """An object of at most so many bytes.

        Raises:
            IntegrityError: it is missing, or longer.
            StorageError: the storage refused.
        """

    def read_chunk(self, name: str, room: memoryview) -> None:
        """A chunk that is as long as `room`, into it. Raises as `read` does, also where it is shorter."""

    def objects(self) -> frozenset[str]:
        """The names of all objects that are there. Raises StorageError: they cannot be listed."""


def open_storage(where: str) -> Storage:
    """The storage at a path or a URL.

    Raises:
        ConfigError: a URL of a kind that is not read, or whose package is not installed.
    """
    scheme, separator, _ = where.partition("://")
    if not separator:
        return LocalStorage(Path(where))
    if scheme == "file":
        parts = urlsplit(where)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{where}: a file:// URL has three slashes before its path")
        return LocalStorage(Path(unquote(parts.path)))
    return UrlStorage(where)


class LocalStorage:
    """A folder on this machine, which others may write to at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        with _storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if any(self._folder.iterdir()):
                raise FileExistsError(errno.EEXIST, "it is not empty: name a folder that is")
            (self._folder / CHUNKS).mkdir()  # of two who seal at once, one is refused here

    def write_chunk(self, name: str, contents: memoryview) -> None:
        with _storage_errors(self._folder):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._folder / CHUNKS / name, flags, 0o644)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                done = 0
                while done < len(contents):
                    done += file.write(contents[done:])

    def write_manifest(self, contents: bytes) -> None:
        with _storage_errors(self._folder):
            write_new(self._folder / MANIFEST, contents, 0o644)

    def remove(self, chunks: Set[str]) -> None:
        with contextlib.suppress(OSError):
            for name in chunks:
                (self._folder / CHUNKS / name).unlink(missing_ok=True)
            (self._folder / CHUNKS).rmdir()

    def read(self, name: str, most: int) -> bytes:
        with self._opened(name) as file:
            return _read_at_most(file, most, name)

    def read_chunk(self, name: str, room: memoryview) -> None:
        with self._opened(f"{CHUNKS}/{name}") as file:
            _fill(file, room, name)

    def objects(self) -> frozenset[str]:
        with _storage_errors(self._folder):
            outer = {it.name for it in self._folder.iterdir()}
            inner = {f"{CHUNKS}/{it.name}" for it in (self._folder / CHUNKS).iterdir()}
        return frozenset(outer - {CHUNKS} | inner)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """A regular file; no link is followed, and neither a pipe nor a device is waited for."""
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise IntegrityError(f"{path} is no regular file")
                yield cast(BinaryIO, file)
        except FileNotFoundError:
            raise IntegrityError(f"{path} is missing") from None
        except OSError as error:
            if error.errno in _CHANGED:
                raise IntegrityError(f"{path} is no regular file") from None
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


class UrlStorage:
    """What fsspec opens: object stores and web servers."""

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        if scheme not in PROTOCOLS or "::" in url:
            raise ConfigError(f"{scheme}://…: bundles lie at a path, or at a URL of {', '.join(('file', *PROTOCOLS))}")
        try:
            import fsspec

            filesystem, path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"a URL {scheme}://… cannot be opened: {error}") from error
        self._filesystem: Any = filesystem
        self._root = path.rstrip("/")
        parts = urlsplit(url)
        self._shown = f"{scheme}://{parts.hostname or ''}{parts.path}"  # no password, no token

    def create(self) -> None:
        if self._try(lambda: self._filesystem.exists(f"{self._root}/{MANIFEST}")) or self.objects():
            raise StorageError(f"cannot write to {self._shown}: it is not empty")

    def write_chunk(self, name: str, contents: memoryview) -> None:
        self._try(lambda: self._filesystem.pipe_file(f"{self._root}/{CHUNKS}/{name}", bytes(contents)))

    def write_manifest(self, contents: bytes) -> None:
        self._try(lambda: self._filesystem.pipe_file(f"{self._root}/{MANIFEST}", contents))

    def remove(self, chunks: Set[str]) -> None:
        def remove() -> None:
            for name in chunks:
                with contextlib.suppress(FileNotFoundError):  # it was never written
                    self._filesystem.rm_file(f"{self._root}/{CHUNKS}/{name}")

        with contextlib.suppress(StorageError):
            self._try(remove)

    def read(self, name: str, most: int) -> bytes:
        def read() -> bytes:
            with self._filesystem.open(f"{self._root}/{name}", "rb") as file:
                return _read_at_most(file, most, name)

        return self._try(read)

    def read_chunk(self, name: str, room: memoryview) -> None:
        def read() -> None:
            with self._filesystem.open(f"{self._root}/{CHUNKS}/{name}", "rb") as file:
                _fill(file, room, name)

        self._try(read)

    def objects(self) -> frozenset[str]:
        try:
            found = self._try(lambda: self._filesystem.find(self._root, detail=False))
        except IntegrityError:  # a folder that is not there
            return frozenset()
        return frozenset(str(it).removeprefix(self._root).lstrip("/") for it in found)

    def _try(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except (IntegrityError, StorageError):
            raise
        except FileNotFoundError:
            raise IntegrityError(f"an object of {self._shown} is missing") from None
        except Exception as error:  # each file system has errors of its own
            raise StorageError(f"{self._shown}: {type(error).__name__}: {str(error)!r:.200}") from error


def _read_at_most(file: BinaryIO, most: int, name: str) -> bytes:
    """All of a file, which may turn out longer than it said."""
    found = bytearray()
    while piece := file.read(min(_PIECE_BYTES, most + 1 - len(found))):
        found += piece
        if len(found) > most:
            raise IntegrityError(f"{name} is longer than {most:,} bytes")
    return bytes(found)


def _fill(file: BinaryIO, room: memoryview, name: str) -> None:
    """All of a file, which must be as long as `room`."""
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])  # type: ignore[attr-defined]  # files of fsspec have it too
        if not count:
            raise IntegrityError(f"{chunk_label(name)} ends after {done:,} bytes; expected {len(room):,}")
        done += count
    if file.read(1):
        raise IntegrityError(f"{chunk_label(name)} is longer than {len(room):,} bytes")


def chunk_label(name: str) -> str:
    """A chunk's name for people: enough to find its object by, and nothing of what it holds."""
    return f"chunk {name[:12]}…"


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot use {folder} as storage: {error.strerror or error}") from error
