"""W_star on the enclave's disk, for a worker that has lost it.

W_star is no secret from the cloud: it is what the worker holds. So it may lie on a disk that the cloud
reads; that the cloud has not changed it is checked against a SHA-256 kept in the enclave's memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.link import MatrixSource
from obfuscatune.wire.errors import ProtectionError, StorageError
from obfuscatune.wire.files import temporary_root
from obfuscatune.wire.tensors import bytes_of, content_digest


class Spool:
    """A directory of matrices; removed when neither it nor any of its matrices is in use."""

    def __init__(self, parent: Path | None = None) -> None:
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="obfuscatune-spool-", dir=parent or temporary_root()))
        except OSError as error:
            raise StorageError(f"cannot make a spool directory: {error}") from error
        weakref.finalize(self, _unless_forked, os.getpid(), shutil.rmtree, self._directory, ignore_errors=True)
        self._count = 0

    def keep(self, W_star: Tensor) -> MatrixSource:
        """Write the matrix (p, q); what is returned reads it back.

        Raises:
            StorageError: the disk is full or gone.
        """
        path = self._directory / f"{self._count:06d}.bin"
        self._count += 1
        try:
            path.write_bytes(bytes_of(W_star))
        except OSError as error:
            raise StorageError(
                f"cannot spool a matrix to {path}: {error.strerror}; point TMPDIR to a disk with room for the model"
            ) from error
        kept = _SpooledMatrix(self, path, content_digest(W_star), W_star.shape, W_star.dtype)
        # Re-keyed, another matrix has taken its place.
        weakref.finalize(kept, _unless_forked, os.getpid(), path.unlink, missing_ok=True)
        return kept


@dataclass(frozen=True)
class _SpooledMatrix:
    """Reads one matrix back, and sees that it is the one that was written."""

    spool: Spool  # keeps the directory alive
    path: Path
    digest: bytes
    shape: torch.Size
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        W_star = torch.empty(self.shape, dtype=self.dtype)
        try:
            with self.path.open("rb") as file:
                complete = file.readinto(bytes_of(W_star)) == W_star.nbytes
        except OSError as error:
            raise StorageError(f"cannot read the spooled matrix {self.path}: {error.strerror}") from error
        if not complete or content_digest(W_star) != self.digest:
            raise ProtectionError(f"the spooled matrix {self.path} is not what was written: somebody changed it")
        return W_star


def _unless_forked(owner: int, remove: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Remove what process `owner` made, in that process: a forked child that ends leaves it alone."""
    if os.getpid() == owner:
        remove(*args, **kwargs)
