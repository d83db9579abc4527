"""The newest head of an enclave's audit log that its owner has seen, so that a state that was set back is noticed.

A verified enclave signs the head of its log. What it keeps lies on a disk of somebody else's, who can put back an older
state while the enclave is stopped, or run two from one state. Either way the log no longer goes on from the head that
is kept here; `HeadFile` then raises IntegrityError, and whoever asked releases and forwards nothing more.

    kept head  ->  the lines behind it, with the head that the enclave signs now  ->  kept head
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import httpx

from obfuscatune.channel.audit_chain import MOST_LINE_BYTES, Head, verify_copy
from obfuscatune.documents import canonical, parse
from obfuscatune.errors import ChannelError, ConnectionLost, DeadlineExceeded, IntegrityError, StorageError
from obfuscatune.protocol.files import lock, read_trusted, write_over

SECONDS = 600.0
"""For all the lines behind a head."""
MOST_BYTES = 4 * 2**30
"""Of these lines."""
_TRIES = 64
"""Of writing a head: each that fails is one of another program that went on."""
_PATH = "/obfuscatune/v1/audit-log"


class HeadFile:
    """The head of one enclave's log, in a file that several programs of an owner's may share."""

    def __init__(self, folder: Path, enclave: str) -> None:
        """Read nothing yet.

        Args:
            folder: of all such files; made where it is missing.
            enclave: its address, by which the file is found again.
        """
        self._enclave = enclave
        self.path = folder / f"{quote(enclave, safe='')}.json"

    def read(self) -> Head | None:
        """The head that is kept; None where none is.

        Raises:
            IntegrityError: the file holds something else.
            ConfigError, StorageError: it cannot be read, or others may write it.
        """
        try:
            content = read_trusted(self.path, "log head")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror or error}") from error
        try:
            document = parse(content, most_bytes=MOST_LINE_BYTES)
            signed = document.get("head")
            if set(document) != {"enclave", "head"} or document["enclave"] != self._enclave:
                raise IntegrityError("not of this enclave's log")
            key = signed.get("key") if isinstance(signed, dict) else None
            return Head.from_signed(signed, frozenset({str(key)}))
        except IntegrityError as error:
            raise IntegrityError(f"{self.path} is not the log head that was kept: {error}") from error

    def expect(self, ask: Callable[[], Any], signing_key: str) -> Head:
        """See that an enclave's head is not behind the one that is kept, before anything is released to it.

        Args:
            ask: asks the enclave for its signed head: after the file was read, which others may go on with meanwhile.
            signing_key: which its evidence names, in hex.

        Raises:
            IntegrityError: it is behind, or another's.
        """
        kept = self.read()
        head = Head.from_signed(ask(), frozenset({signing_key}))
        if kept is not None and head.count < kept.count:
            raise self._set_back(kept, f"it has {head.count:,} entries now")
        if kept is not None and head.count == kept.count and head.chain != kept.chain:
            raise self._set_back(kept, "the last of these is another now")
        return head

    def follow(self, api: httpx.Client, signing_key: str, told: Head) -> Head:
        """Have the enclave prove that its log goes on from the head that is kept, and keep the newest one.

        Args:
            api: reaches the verified enclave, and nothing else.
            told: what `expect` returned, which counts where none is kept.

        Raises:
            IntegrityError: it does not go on.
            ConnectionLost, DeadlineExceeded, ChannelError: the enclave gives no log.
            StorageError, ConfigError: the head cannot be kept.
        """
        for _ in range(_TRIES):
            kept = self.read()
            begins_at = kept or told
            try:
                with _lines_behind(begins_at, api) as lines:
                    head, _ = verify_copy(lines, frozenset({signing_key}), begins_at=begins_at)
            except IntegrityError as error:
                raise self._set_back(begins_at, str(error)) from error
            if self._replace(kept, head):
                return head
        raise StorageError(f"{self.path}: other programs change it all the time")

    def _set_back(self, seen: Head, why: str) -> IntegrityError:
        return IntegrityError(
            f"the audit log of {self._enclave} does not go on from the {seen.count:,} entries that were seen of it: "
            f"{why}. Its state was set back, or others see another log. Once its operator has explained that to you, "
            f"remove {self.path}"
        )

    def _replace(self, before: Head | None, head: Head) -> bool:
        """Keep a head in the place of another; whether that was still there."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.parent):
                if self.read() != before:
                    return False
                if before is None or head.count != before.count:
                    write_over(self.path, canonical({"enclave": self._enclave, "head": head.signed}) + b"\n")
                return True
        except OSError as error:
            raise StorageError(
                f"the head of the enclave's log cannot be kept at {self.path}: {error.strerror or error}; "
                "name a folder of yours by --heads"
            ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One program at a time; a file system without locks has none."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lines_behind(head: Head, api: httpx.Client) -> Iterator[BinaryIO]:
    """The log's lines behind a head, as a file, while they come."""
    try:
        with api.stream("GET", _PATH, params={"since": head.count}) as reply:
            if reply.status_code != httpx.codes.OK:
                raise ChannelError(f"the enclave gives no audit log: HTTP status {reply.status_code}")
            yield cast(BinaryIO, io.BufferedReader(_Body(reply.iter_bytes())))
    except httpx.TransportError as error:
        raise ConnectionLost(f"the audit log did not come: {type(error).__name__}") from error


class _Body(io.RawIOBase):
    """An answer's bytes as a file, at most so many and within so long a time."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest, self._size = pieces, memoryview(b""), 0
        self._ends = time.monotonic() + SECONDS

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, room: Any) -> int:
        """See `io.RawIOBase`."""
        while not self._rest:
            if time.monotonic() > self._ends:
                raise DeadlineExceeded(f"the audit log did not come within {SECONDS:.0f} s")
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest, self._size = memoryview(piece), self._size + len(piece)
            if self._size > MOST_BYTES:
                raise ChannelError(f"more than {MOST_BYTES:,} bytes of an audit log")
        count = min(len(room), len(self._rest))
        room[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
