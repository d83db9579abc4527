"""What not every disk offers: a folder for temporary files that can be written to, and `fsync`."""

import errno
import os
import tempfile
from pathlib import Path

from obfuscatune.wire.address import MAX_UNIX_PATH_BYTES
from obfuscatune.wire.errors import StorageError

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
