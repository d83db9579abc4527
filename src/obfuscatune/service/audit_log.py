"""A hash-chained log: who, what, when, digests; never content.

A line of the file is `{"chain": <hex>, "entry": {...}}`, canonical JSON. With `digest_n` the SHA-256 of an entry's
canonical bytes,

    chain_n = SHA-256("obfuscatune/audit/v1" || chain_(n-1) || digest_n),    chain_(-1) = 32 zero bytes.

In a party's copy the entries of others stand as `{"chain": ..., "digest": <hex>}`, and the chain verifies all the same;
each entry has a random salt, so that its digest tells nothing of it. The copy ends with `{"head": <signed>}`: number of
entries and last chain value, signed by the key that the claims name.

An entry is on disk before `append` returns. A line that was being written when the power failed is cut off when the log
is opened, and an entry says so. Anything else that is not as it was written is refused.
"""

import errno
import fcntl
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

from obfuscatune.documents import canonical, parse, sign, verify
from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.protocol.files import NOT_OFFERED, sync

PURPOSE = "audit-head"
SERVICE = "service"
"""Who did what nobody asked for."""
MOST_LINE_BYTES = 64 * 2**10
START = bytes(32)
_LABEL = b"obfuscatune/audit/v1"
_FIELDS = {"n", "at", "who", "what", "details", "salt"}


def next_chain(chain: bytes, digest: bytes) -> bytes:
    """The chain's value after an entry with that digest."""
    return hashlib.sha256(_LABEL + chain + digest).digest()


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
                _lock(descriptor, path)
                self.count, self._chain, whole, size = _read_to_end(path)
                if whole != size:
                    os.ftruncate(descriptor, whole)
                    sync(descriptor)
                _sync_folder(path.parent)
                stack.pop_all()
        except OSError as error:
            raise StorageError(f"{path}: the disk refused: {error.strerror or error}") from error
        self._synced = self.count
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
            self.count, self._chain = self.count + 1, chain
            mine = self.count
        with self._sync_lock:
            if self._synced >= mine:
                return
            reached = self.count  # others may have written meanwhile: they need not wait for a write of their own
            try:
                sync(self._file.fileno())
            except OSError as error:
                self._break(error)
                raise StorageError(self._broken or "") from error
            self._synced = reached

    def head(self) -> dict[str, Any]:
        """Number of entries and last chain value, signed."""
        with self._write_lock:
            return self._head()

    def _head(self) -> dict[str, Any]:
        document = {"version": 1, "count": self.count, "chain": self._chain.hex(), "at": int(time.time())}
        return sign(document, PURPOSE, self._key)

    def copy_for(self, who: str | None) -> Iterator[bytes]:
        """The lines of a party's copy: its own entries, the service's, and others' digests. None is the whole."""
        with self._write_lock:
            head, count = self._head(), self.count
        with self.path.open("rb") as file:
            for _ in range(count):
                line = _read_line(file)
                fields = parse(line)
                if who is None or fields["entry"]["who"] in (who, SERVICE):
                    yield line
                else:
                    digest = hashlib.sha256(canonical(fields["entry"])).hexdigest()
                    yield canonical({"chain": fields["chain"], "digest": digest}) + b"\n"
        yield canonical({"head": head}) + b"\n"

    def close(self) -> None:
        """Close the file."""
        with self._write_lock:
            self._broken = self._broken or f"{self.path}: the log is closed"
            self._file.close()

    def _break(self, error: OSError) -> None:
        self._broken = f"{self.path}: the disk refused: {error.strerror or error}; the service records nothing more"


def verify_copy(file: BinaryIO, keys: frozenset[str], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Verify a party's copy of a log.

    Args:
        keys: Ed25519 public keys in hex, one of which must have signed the head.
        earlier: the document within an earlier head, which this log must go on from.

    Returns:
        The document within the head, with the number of entries in clear as `clear`.

    Raises:
        IntegrityError: entries were changed, left out or reordered; the head is missing or another's; or the log does
            not go on from the earlier one.
    """
    chain, count, clear, met = START, 0, 0, earlier is None or earlier["count"] == 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        fields = _parsed(line, count)
        if set(fields) == {"head"}:
            if file.read(1):
                raise IntegrityError("something stands behind the head of the log")
            head = verify(fields["head"] if isinstance(fields["head"], dict) else {}, PURPOSE, keys)
            if head.get("count") != count or head.get("chain") != chain.hex():
                raise IntegrityError(
                    f"the head is of {head.get('count')} entries with another chain value than these {count} have"
                )
            if not met:
                raise IntegrityError("this log does not go on from the earlier head: entries were taken back")
            return head | {"clear": clear}
        chain, is_clear = _step(fields, chain, count)
        clear += is_clear
        count += 1
        if earlier is not None and earlier["count"] == count:
            met = earlier["chain"] == chain.hex()
    raise IntegrityError(f"the log ends after {count} entries without a signed head: its end was cut off")


def _read_to_end(path: Path) -> tuple[int, bytes, int, int]:
    """Number of entries, last chain value, bytes of whole lines, and of the file."""
    chain, count, whole = START, 0, 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while line := file.readline(MOST_LINE_BYTES + 1):
            if not line.endswith(b"\n") and whole + len(line) == size:
                break  # was being written
            chain, is_clear = _step(_parsed(line, count), chain, count)
            if not is_clear:
                raise IntegrityError(f"{path}: line {count + 1} is of a copy, not of the log itself")
            count, whole = count + 1, whole + len(line)
    return count, chain, whole, size


def _read_line(file: BinaryIO) -> bytes:
    return file.readline(MOST_LINE_BYTES + 1)


def _parsed(line: bytes, count: int) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise IntegrityError(f"line {count + 1} of the log has no end, or more than {MOST_LINE_BYTES} bytes")
    try:
        return parse(line, most_bytes=MOST_LINE_BYTES)
    except IntegrityError as error:
        raise IntegrityError(f"line {count + 1} of the log: {error}") from error


def _step(fields: Mapping[str, Any], chain: bytes, count: int) -> tuple[bytes, bool]:
    """The chain's value after a line, which must be the one that the line has; and whether its entry is in clear."""
    if set(fields) == {"chain", "entry"} and isinstance(fields["entry"], dict):
        entry = fields["entry"]
        if set(entry) != _FIELDS or entry["n"] != count:
            raise IntegrityError(f"line {count + 1} of the log is not the entry of that number")
        digest = hashlib.sha256(canonical(entry)).digest()
    elif set(fields) == {"chain", "digest"} and isinstance(fields["digest"], str):
        try:
            digest = bytes.fromhex(fields["digest"])
        except ValueError as error:
            raise IntegrityError(f"line {count + 1} of the log has no digest") from error
    else:
        raise IntegrityError(f"line {count + 1} of the log is neither an entry, a digest nor a head")
    found = next_chain(chain, digest)
    if fields["chain"] != found.hex():
        raise IntegrityError(f"the chain breaks at line {count + 1} of the log: this entry or one before was changed")
    return found, "entry" in fields


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{path}: another service is writing here; choose another state directory") from None
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
