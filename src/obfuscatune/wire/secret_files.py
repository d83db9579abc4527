"""Files that hold a key, or say whose key to trust: read only where nobody else could, written whole or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from obfuscatune.wire.errors import ConfigError
from obfuscatune.wire.files import sync

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
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        _name_unless_taken(draft, path)
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
