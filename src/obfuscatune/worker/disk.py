"""Matrices on disk by their content, so that a second run need not upload them again.

A file bears the SHA-256 of dtype, shape and elements as its name, with dtype and shape beside it, and holds the
elements alone. It is checked whenever it is read, so the folder need not be trusted; whoever names a digest had the
matrix, or was told by someone who had. Who names it with another shape asks for another file, so that nobody can have
one taken for damaged.
"""

import logging
import os
import secrets
from io import FileIO
from pathlib import Path

import torch

from obfuscatune.wire.dtypes import DType
from obfuscatune.wire.errors import StorageError
from obfuscatune.wire.files import sync
from obfuscatune.wire.tensors import bytes_of, content_digest

log = logging.getLogger(__name__)


class ContentStore:
    """A folder of matrices. Nothing is ever deleted but what is damaged; the folder may be emptied at any time."""

    def __init__(self, folder: Path) -> None:
        """Raises StorageError: the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot use --store {folder}: {error.strerror}") from error
        self._folder = folder

    def load(self, digest: bytes, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """The matrix (p, q) with that digest; None where it is not here, or damaged (then it is removed)."""
        path = self._path(digest, shape, dtype)
        try:
            size = path.stat().st_size
            matrix = torch.empty(shape, dtype=dtype)
            with path.open("rb", buffering=0) as file:
                whole = size == matrix.nbytes and _fill(file, bytes_of(matrix))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read %s: %s; it is asked for again", path, error.strerror)
            return None
        if whole and content_digest(matrix) == digest:
            return matrix
        log.warning("%s is damaged: removed, and asked for again", path)
        path.unlink(missing_ok=True)
        return None

    def save(self, matrix: torch.Tensor) -> None:
        """Keep a matrix; the file appears whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        rows, cols = matrix.shape
        path = self._path(content_digest(matrix), (rows, cols), matrix.dtype)
        if path.exists():
            return
        draft = self._folder / f".{path.name}.{secrets.token_hex(8)}"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = bytes_of(matrix)
                while view:
                    view = view[file.write(view) :]
                sync(file.fileno())
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise StorageError(f"cannot keep a matrix in {self._folder}: {error.strerror}") from error

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
