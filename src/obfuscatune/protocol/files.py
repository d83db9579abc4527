"""Files that hold a key, or say whose key to trust: read only where nobody else could, written whole or not at all.

Also what not every disk offers: a folder for temporary files that can be written to, and `fsync`.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from obfuscatune.errors import ConfigError, StorageError

MAX_UNIX_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""sockaddr_un.sun_path on Linux, or on macOS and the BSDs, less the final zero."""
SOCKET_ROOM = 40
"""Bytes of a socket's path below the folder that `temporary_root` returns: /obfuscatune-xxxxxxxx/worker.sock."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - what is made there has a random name and mode 0700

NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""How file systems (of networks, in user space) say that they have no locks, or nothing like `fsync`."""


def sync(descriptor: int) -> None:
    """Have a file, or the names in a folder, on disk before this returns; where the file system cannot, go on.

    Raises:
        OSError: the disk refused.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def temporary_root(*, for_socket: bool = False) -> Path:
    """The folder in which temporary folders are made.

    Args:
        for_socket: a socket will lie there, whose path is limited: take a shorter folder where TMPDIR is too long.

    Raises:
        StorageError: no such folder exists that this user may write to.
    """
    try:
        preferred = tempfile.gettempdir()
    except OSError as error:
        raise StorageError(f"no folder for temporary files: {error.strerror}; set TMPDIR to one") from error
    if not for_socket:
        if not _is_writable(preferred):
            raise StorageError(f"cannot write temporary files to {preferred}: set TMPDIR to a folder of yours")
        return Path(preferred)
    for folder in (preferred, os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT_FOLDERS):
        if len(os.fsencode(folder)) + SOCKET_ROOM <= MAX_UNIX_PATH_BYTES and _is_writable(folder):
            return Path(folder)
    raise StorageError(
        f"no folder for a socket: {preferred} cannot be written to, or its path is longer than "
        f"{MAX_UNIX_PATH_BYTES - SOCKET_ROOM} bytes; set TMPDIR to a shorter one"
    )


def _is_writable(folder: str) -> bool:
    return bool(folder) and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)


PEM_BEGINS = "-----BEGIN "
_GROUP_OR_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_BEYOND_GROUP_READ = _GROUP_OR_OTHERS & ~stat.S_IRGRP
_ROOT = 0


def read_secret(path: Path, what: str) -> bytes:
    """The contents of a key file.

    As ssh does, it refuses a file of ours that others may read or write; as PostgreSQL does, it takes one of root's
    that our group may read, which is how a system hands a key to a service, and none of any other user's.

    Args:
        path: a file; a symbolic link is followed.
        what: how to name it in an error, "key file" say.

    Raises:
        ConfigError: others may read or write it, it is another user's, or no regular file.
        OSError: it cannot be read.
    """
    content, found = _read(path, what, "who knows what it holds")
    if found.st_mode & (_GROUP_OR_OTHERS if found.st_uid == os.geteuid() else _BEYOND_GROUP_READ):
        mode = found.st_mode & 0o777
        raise ConfigError(f"{what} {path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    return content


def read_trusted(path: Path, what: str) -> bytes:
    """The contents of a file that is no secret, and says whom to trust: nobody else may have written it.

    Args:
        path, what: as for `read_secret`.

    Raises:
        ConfigError: everybody may write it, it is another user's, or no regular file.
        OSError: it cannot be read.
    """
    content, found = _read(path, what, "who may change what it says")
    if found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{what} {path} can be changed by everybody; run: chmod 644 {path}")
    return content


def read_pem(named: str, folder: Path, what: str) -> bytes:
    """A certificate of which a file of settings says where it is, or which stands there itself.

    Args:
        named: the certificate in PEM, or its path.
        folder: paths are relative to it.
        what: as for `read_trusted`.

    Raises:
        ConfigError: the file cannot be read, or others may have written it.
    """
    if named.lstrip().startswith(PEM_BEGINS):
        return named.encode()
    try:
        return read_trusted(folder / named, what)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {folder / named}: {error.strerror}") from error


def _read(path: Path, what: str, danger: str) -> tuple[bytes, os.stat_result]:
    """A regular file of ours or root's, and what the system says of the very file that was read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # at once, were it a pipe
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{what} {path} is no regular file")
        if found.st_uid not in (os.geteuid(), _ROOT):
            raise ConfigError(f"{what} {path} belongs to another user (uid {found.st_uid}), {danger}: use one of yours")
        return file.read(), found


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Make a file, for this user alone unless `mode` says otherwise. It is there whole or not at all.

    Raises:
        FileExistsError: something has that name, be it a symbolic link to nowhere; it is not touched.
        OSError: it cannot be written; nothing is left.
    """
    with _draft(path, content, mode) as draft:
        _name_unless_taken(draft, path)


def write_over(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Make a file, in the place of one of that name. Before and after a power failure it is one of the two, whole.

    Raises:
        OSError: it cannot be written; the old one is there.
    """
    with _draft(path, content, mode) as draft:
        draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder be on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file against other processes, until it is closed; False where its file system has no locks.

    Raises:
        BlockingIOError: another process has the lock, and this one is not to `wait`.
        OSError: the file cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


@contextlib.contextmanager
def _draft(path: Path, content: bytes, mode: int) -> Iterator[Path]:
    """The file on disk, under a name that is removed when the `with` ends."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        yield draft
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _name_unless_taken(draft: Path, path: Path) -> None:
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        draft.rename(path)
