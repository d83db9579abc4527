"""The audit log, as the service writes it: who, what, when, digests; never content. `channel.audit_chain` verifies it.

An entry is on disk before `append` returns, and a head that is told speaks of entries on disk alone. A line that was
being written when the power failed is cut off when the log is opened, and an entry says so. Anything else that is not
as it was written is refused.
"""

import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.channel.audit_chain import MOST_LINE_BYTES, PURPOSE, START, Head, next_chain, parse_line, step
from obfuscatune.documents import canonical, parse, sign
from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.protocol.files import lock, sync, sync_folder

SERVICE = "service"
"""Who did what nobody asked for."""
_STRIDE = 256
"""Entries from one offset that is remembered to the next."""


class AuditLog:
    """The file, opened to append. Safe from any thread."""

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        """Verify the file, or make it.

        Raises:
            IntegrityError: it is not what was written.
            StorageError: the disk refused.
            ConfigError: another process has it open.
        """
        self.path = path
        self._key = key
        self._write_lock, self._sync_lock = threading.Lock(), threading.Lock()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with ExitStack() as stack:
                self._file = stack.enter_context(os.fdopen(descriptor, "r+b", buffering=0))
                lock(descriptor)
                self.count, self._chain, self._offsets, whole, size = _read_to_end(path)
                if whole != size:
                    os.ftruncate(descriptor, whole)
                    sync(descriptor)
                sync_folder(path.parent)
                stack.pop_all()
        except BlockingIOError:
            raise ConfigError(f"{path}: another service is writing here; choose another state directory") from None
        except OSError as error:
            raise StorageError(f"{path}: the disk refused: {error.strerror or error}") from error
        self._synced, self._size = self.count, whole
        self._broken: str | None = None
        self.repaired = size - whole
        """Bytes of an entry that was not written to its end."""
        if self.repaired:
            self.append(SERVICE, "log-repaired", {"bytes": self.repaired})

    def append(self, who: str, what: str, details: Mapping[str, Any] | None = None) -> None:
        """Write an entry; it is on disk when this returns. Entries of several threads share one write to disk.

        Args:
            who: SHA-256 of a party's public key, or `SERVICE`.
            what: the kind of event.
            details: identifiers, digests, counts. Never content.

        Raises:
            StorageError: the disk refused. Nothing is appended any more.
        """
        with self._write_lock:
            if self._broken:
                raise StorageError(self._broken)
            entry = {
                "n": self.count,
                "at": int(time.time()),
                "who": who,
                "what": what,
                "details": dict(details or {}),
                "salt": secrets.token_hex(16),
            }
            content = canonical(entry)
            chain = next_chain(self._chain, hashlib.sha256(content).digest())
            line = b'{"chain":"' + chain.hex().encode() + b'","entry":' + content + b"}\n"
            if len(line) > MOST_LINE_BYTES:
                raise StorageError(f"an entry of {len(line)} bytes; at most {MOST_LINE_BYTES} are written")
            try:
                written = os.write(self._file.fileno(), line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._break(error)
                raise StorageError(self._broken or "") from error
            if self.count % _STRIDE == 0:
                self._offsets.append(self._size)
            self.count, self._chain, self._size = self.count + 1, chain, self._size + len(line)
            mine = self.count
        self._wait_for_disk(mine)

    def _wait_for_disk(self, count: int) -> None:
        """Return when so many entries are on disk."""
        with self._sync_lock:
            if self._synced >= count:
                return
            if self._broken:  # what a disk refused once, it may say to have written the second time
                raise StorageError(self._broken)
            reached = self.count  # others may have written meanwhile: they need not wait for a write of their own
            try:
                sync(self._file.fileno())
            except OSError as error:
                self._break(error)
                raise StorageError(self._broken or "") from error
            self._synced = reached

    def head(self) -> dict[str, Any]:
        """Number of entries and last chain value, signed. A party holds us to it: those entries are on disk.

        Raises:
            StorageError: the disk refused.
        """
        with self._write_lock:
            head = Head(self.count, self._chain, int(time.time()))
        self._wait_for_disk(head.count)
        return sign(head.to_document(), PURPOSE, self._key)

    def copy_for(self, who: str | None, since: int = 0) -> Iterator[bytes]:
        """The lines of a party's copy: its own entries, the service's, and others' digests. None is the whole.

        Args:
            since: leave out as many entries from the beginning. Where there are fewer, the head alone is left.
        """
        head = self.head()
        count = head["document"]["count"]
        with self.path.open("rb") as file:
            if since < count:
                file.seek(self._offsets[since // _STRIDE])
                for _ in range(since % _STRIDE):
                    _read_line(file)
            for _ in range(since, count):
                line = _read_line(file)
                fields = parse(line)
                if who is None or fields["entry"]["who"] in (who, SERVICE):
                    yield line
                else:
                    digest = hashlib.sha256(canonical(fields["entry"])).hexdigest()
                    yield canonical({"chain": fields["chain"], "digest": digest}) + b"\n"
        yield canonical({"head": head}) + b"\n"

    def entries(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The entries of these kinds, the oldest first."""
        wanted = tuple(f'"what":"{it}"'.encode() for it in kinds)
        with self._write_lock:
            count = self.count
        with self.path.open("rb") as file:
            for _ in range(count):
                line = _read_line(file)
                if any(it in line for it in wanted) and (entry := parse(line)["entry"])["what"] in kinds:
                    yield entry

    def close(self) -> None:
        """Close the file."""
        with self._write_lock:
            self._broken = self._broken or f"{self.path}: the log is closed"
            self._file.close()

    def _break(self, error: OSError) -> None:
        self._broken = f"{self.path}: the disk refused: {error.strerror or error}; the service records nothing more"


def _read_to_end(path: Path) -> tuple[int, bytes, list[int], int, int]:
    """Number of entries, last chain value, offset of every `_STRIDE`th line, bytes of whole lines, and of the file."""
    chain, count, whole = START, 0, 0
    offsets: list[int] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while line := _read_line(file):
            if not line.endswith(b"\n") and whole + len(line) == size:
                break  # was being written
            chain, is_clear = step(parse_line(line, count), chain, count)
            if not is_clear:
                raise IntegrityError(f"{path}: line {count + 1} is of a copy, not of the log itself")
            if count % _STRIDE == 0:
                offsets.append(whole)
            count, whole = count + 1, whole + len(line)
    return count, chain, offsets, whole, size


def _read_line(file: BinaryIO) -> bytes:
    return file.readline(MOST_LINE_BYTES + 1)
