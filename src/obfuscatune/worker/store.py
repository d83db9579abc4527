"""The matrices that a worker holds, each session's apart from every other's; and, on disk, by their content.

On disk a second run finds what an earlier one uploaded. A file bears the SHA-256 of dtype, shape and elements as its
name, with dtype and shape beside it, and holds the elements alone. It is checked whenever it is read, so the folder
need not be trusted; whoever names a digest had the matrix, or was told by someone who had. Who names it with another
shape asks for another file, so that nobody can have one taken for damaged. All files together keep to a quota: those
that were not used for longest are removed, of peers that have more than their share (`Quota.giving_way`).
"""

import contextlib
import errno
import logging
import os
import secrets
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal, Protocol

import torch

from obfuscatune.errors import QuotaExceeded, StorageError, UnknownMatrix
from obfuscatune.protocol.files import sync
from obfuscatune.protocol.limits import MAX_MATRICES
from obfuscatune.protocol.messages import ErrorCode
from obfuscatune.protocol.tensors import DType, bytes_of, content_digest
from obfuscatune.worker.quota import NOBODY, Claim, Quota, SessionKey
from obfuscatune.worker.replies import RequestError

log = logging.getLogger(__name__)


DRAFT_SECONDS = 3600.0
"""A draft that is older was left by a worker that was killed; a younger one may be another worker's."""


class ContentStore:
    """A folder of matrices, which may be emptied at any time. Safe from any thread."""

    def __init__(self, folder: Path, quota: Quota) -> None:
        """Raises StorageError: the folder cannot be made, or cannot be cleared of what is too much."""
        self._folder = folder
        self._quota = quota
        self._kept: OrderedDict[Path, Claim] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._take_stock()
        except OSError as error:
            raise StorageError(f"cannot use --store {folder}: {error.strerror}") from error

    def load(
        self, session: SessionKey, digest: bytes, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The matrix (p, q) with that digest; None where it is not here, or damaged (then it is removed)."""
        path = self._path(digest, shape, dtype)
        matrix = torch.empty(shape, dtype=dtype)
        try:
            size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                whole = size == matrix.nbytes and _fill(file, bytes_of(matrix))
        except FileNotFoundError:
            self._forget(path)
            return None
        except OSError as error:
            log.warning("cannot read %s: %s; it is asked for again", path, error.strerror)
            return None
        if whole and content_digest(matrix) == digest:
            self._used(path, session)
            return matrix
        log.warning("%s is damaged: removed, and asked for again", path)
        self._remove(path)
        return None

    def holds(self, digest: bytes, shape: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether there is a file of that name; what is in it, `load` tells."""
        return self._path(digest, shape, dtype).exists()

    def save(self, session: SessionKey, matrix: torch.Tensor) -> None:
        """Keep a matrix; the file appears whole or not at all.

        Raises:
            StorageError: the disk refused.
            QuotaExceeded: it is larger than all that the session's peer may keep.
        """
        rows, cols = matrix.shape
        path = self._path(content_digest(matrix), (rows, cols), matrix.dtype)
        if path.exists():
            self._used(path, session)
            return
        claim = self._claim(session, matrix.nbytes)
        draft = self._folder / f".{path.name}.{secrets.token_hex(8)}"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = bytes_of(matrix)
                while view:
                    view = view[file.write(view) :]
                sync(file.fileno())
            draft.replace(path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            claim.release()
            if isinstance(error, OSError):
                raise StorageError(f"cannot keep a matrix in {self._folder}: {error.strerror}") from error
            raise
        self._keep(path, claim)

    def _claim(self, session: SessionKey, size: int) -> Claim:
        with self._lock:
            for path in self._quota.giving_way(session, size, self._kept.items()):
                path.unlink(missing_ok=True)
                self._kept.pop(path).release()
            return self._quota.claim(session, size)

    def _keep(self, path: Path, claim: Claim) -> None:
        with self._lock:
            before = self._kept.pop(path, None)
            self._kept[path] = claim
        if before is not None:  # two sessions saved the same
            before.release()

    def _used(self, path: Path, session: SessionKey) -> None:
        """The most recently used, from here on; what was nobody's is the session's."""
        with self._lock:
            claim = self._kept.get(path)
            if claim is None:
                return
            self._kept.move_to_end(path)
            if claim.session is NOBODY:
                self._quota.hand_over(claim, session)
        with contextlib.suppress(OSError):  # so that the next worker knows
            os.utime(path)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._forget(path)

    def _forget(self, path: Path) -> None:
        with self._lock:
            claim = self._kept.pop(path, None)
        if claim is not None:
            claim.release()

    def _take_stock(self) -> None:
        """Count what an earlier worker left, and remove drafts, and what is too much."""
        for draft, status in self._files(".*.matrix.*"):
            if time.time() - status.st_mtime > DRAFT_SECONDS:
                draft.unlink(missing_ok=True)
        found = sorted((status.st_mtime, status.st_size, path) for path, status in self._files("*.matrix"))
        for _, size, path in found:
            try:
                self._kept[path] = self._claim(NOBODY, size)
            except QuotaExceeded:
                path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.lstat()

    def _path(self, digest: bytes, shape: tuple[int, int], dtype: torch.dtype) -> Path:
        rows, cols = shape
        return self._folder / f"{digest.hex()}-{rows}x{cols}-{DType.of(dtype).name.lower()}.matrix"


def _fill(file: FileIO, view: memoryview) -> bool:
    """Read until `view` is full; False where the file ends before."""
    while view:
        came = file.readinto(view)
        if not came:
            return False
        view = view[came:]
    return True


WhenFull = Literal["refuse", "evict"]
Key = tuple[SessionKey, bytes]
"""Session and matrix id. A matrix is found only by who stored it."""


class Dependent(Protocol):
    """What sessions keep besides matrices, within the same quota."""

    def forget_session(self, session: SessionKey) -> None:
        """Drop all of a session."""


class MatrixStore:
    """W* by (session, matrix id), within a quota. Safe from any thread."""

    def __init__(self, quota: Quota, when_full: WhenFull = "refuse") -> None:
        """`evict` drops what was not used for longest (`Quota.giving_way` says whose); its owner uploads it again."""
        self.quota = quota
        self._when_full = when_full
        self._held: OrderedDict[Key, tuple[torch.Tensor, Claim]] = OrderedDict()  # least recently used first
        self._numbers: Counter[SessionKey] = Counter()
        self._shared: set[Key] = set()
        self._of_shared = Quota(sys.maxsize)  # counts the bytes of shared matrices; nobody has to make room for them
        self._dependents: list[Dependent] = []
        self._lock = threading.Lock()

    def depend(self, dependent: "Dependent") -> None:
        """Have what a session keeps elsewhere end with what it keeps here."""
        self._dependents.append(dependent)

    def check(self, session: SessionKey, size: int) -> None:
        """Whether `reserve` would find room. Nothing is claimed, and nothing has to give way.

        Raises:
            QuotaExceeded: it would not.
            RequestError: the session has too many matrices.
        """
        with self._lock:
            self._giving_way(session, size)

    def reserve(self, session: SessionKey, size: int) -> Claim:
        """Claim room for `size` bytes before they are received; end the claim by `put`, or release it.

        Raises:
            QuotaExceeded: there is none.
            RequestError: the session has too many matrices.
        """
        with self._lock:
            return self._claim(session, size)

    def put(self, key: Key, matrix: torch.Tensor, claim: Claim) -> None:
        """Hold `matrix` (p, q) under `key`, in place of what was there; the room it takes replaces the `claim`.

        Raises:
            QuotaExceeded: it takes more room than was claimed for it, and there is none.
        """
        with self._lock:
            self._drop(key)
            claim.release()
            own = self._claim(key[0], matrix.nbytes)
            self._held[key] = matrix, own
            self._numbers[key[0]] += 1

    def share(self, key: Key, matrix: torch.Tensor) -> None:
        """Hold under `key` a matrix (p, q) that other sessions hold too: it takes no room of anybody's quota.

        Raises:
            RequestError: the session has too many matrices.
        """
        with self._lock:
            self._drop(key)
            self._check_number(key[0])
            self._held[key] = matrix, self._of_shared.claim(key[0], matrix.nbytes)
            self._shared.add(key)
            self._numbers[key[0]] += 1

    def get(self, key: Key) -> torch.Tensor:
        """The matrix (p, q) under `key`.

        Raises:
            UnknownMatrix: it was never stored, forgotten or evicted, or another session stored it.
        """
        with self._lock:
            if key not in self._held:
                raise UnknownMatrix("this session has no such matrix here (any longer)")
            self._held.move_to_end(key)
            return self._held[key][0]

    def forget(self, key: Key) -> None:
        """Drop one matrix; none is fine."""
        with self._lock:
            self._drop(key)

    def forget_session(self, session: SessionKey) -> None:
        """Drop all that a session stored."""
        with self._lock:
            for key in [key for key in self._held if key[0] == session]:
                self._drop(key)
        for dependent in self._dependents:
            dependent.forget_session(session)

    def held_by(self, session: SessionKey) -> int:
        """Bytes of a session, claims and matrices that it shares included."""
        return self.quota.of_session(session) + self._of_shared.of_session(session)

    @property
    def held_bytes(self) -> int:
        """Bytes of all sessions, claims included, without matrices that are shared."""
        return self.quota.taken

    def _claim(self, session: SessionKey, size: int) -> Claim:
        for key in self._giving_way(session, size):
            self._drop(key)
        return self.quota.claim(session, size)

    def _giving_way(self, session: SessionKey, size: int) -> list[Key]:
        self._check_number(session)
        evictable = self._held.items() if self._when_full == "evict" else ()
        own = [(key, claim) for key, (_, claim) in evictable if key not in self._shared]
        try:
            return self.quota.giving_way(session, size, own)
        except QuotaExceeded as error:
            raise QuotaExceeded(
                f"{error}; load fewer matrices, or have the worker started with another --quota, --peer-quota or "
                "--when-full"
            ) from None

    def _check_number(self, session: SessionKey) -> None:
        if self._numbers[session] >= MAX_MATRICES:
            raise RequestError(ErrorCode.LIMIT, f"a session has at most {MAX_MATRICES} matrices: forget some")

    def _drop(self, key: Key) -> None:
        self._shared.discard(key)
        _, claim = self._held.pop(key, (None, None))
        if claim is not None:
            claim.release()
            self._numbers[key[0]] -= 1
            if not self._numbers[key[0]]:
                del self._numbers[key[0]]
