"""A group of layers on the worker, as the enclave remembers it: enough to send it again, or under new secrets.

    W  ->  obfuscate  ->  W_star, sent once  ->  WeightSource: W_star again for a worker that lost it; W to re-key

Where the model's files do not have W any more, W_star is kept on the enclave's disk. It is no secret from the cloud: it
is what the worker holds. That the cloud has not changed it is checked against a SHA-256 in the enclave's memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.client import MatrixSource
from obfuscatune.enclave.layers import SharedCrossing
from obfuscatune.enclave.obfuscation import Obfuscated, as_fine_as, is_finer, restored
from obfuscatune.enclave.target_layers import ResidualRole
from obfuscatune.enclave.tiles import transform_in_place
from obfuscatune.enclave.transforms import Transform
from obfuscatune.errors import ModelFileError, ProtectionError, StorageError
from obfuscatune.protocol.files import temporary_root
from obfuscatune.protocol.tensors import bytes_of, content_digest


class SpillStore:
    """A directory of matrices; removed when neither it nor any of its matrices is in use."""

    def __init__(self, parent: Path | None = None) -> None:
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="obfuscatune-spill-", dir=parent or temporary_root()))
        except OSError as error:
            raise StorageError(f"cannot make a folder for matrices: {error}") from error
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
                f"cannot keep a matrix to {path}: {error.strerror}; point TMPDIR to a disk with room for the model"
            ) from error
        kept = _SpilledMatrix(self, path, content_digest(W_star), W_star.shape, W_star.dtype)
        # Re-keyed, another matrix has taken its place.
        weakref.finalize(kept, _unless_forked, os.getpid(), path.unlink, missing_ok=True)
        return kept


@dataclass(frozen=True)
class _SpilledMatrix:
    """Reads one matrix back, and sees that it is the one that was written."""

    spill_store: SpillStore  # keeps the directory alive
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
            raise StorageError(f"cannot read the kept matrix {self.path}: {error.strerror}") from error
        if not complete or content_digest(W_star) != self.digest:
            raise ProtectionError(f"the kept matrix {self.path} is not what was written: somebody changed it")
        return W_star


def _unless_forked(owner: int, remove: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Remove what process `owner` made, in that process: a forked child that ends leaves it alone."""
    if os.getpid() == owner:
        remove(*args, **kwargs)


SPILLED_AT_LEAST_IN = torch.float32
"""W_star of a 16-bit W is spilled in it: W then follows from it as it was, and so does W_star in float32."""

SourceInDtype = Callable[[torch.dtype], Tensor]
"""Makes a W_star again, under the same transforms, in the dtype that is asked for."""


class WeightSource(Protocol):
    """Where a group's matrix is to be had again. It holds neither W nor W_star."""

    def weight(self) -> Tensor:
        """W (p, q), contiguous, the caller's own."""

    def keep(self, obfuscated: Obfuscated) -> SourceInDtype:
        """What makes this W_star again; what was kept before is let go."""


class WeightFromFiles:
    """W is read from the model's files each time."""

    def __init__(self, read: Callable[[], Tensor], name: str) -> None:
        self._read, self._name = read, name

    def weight(self) -> Tensor:
        """W (p, q), as the files have it."""
        return self._read()

    def keep(self, obfuscated: Obfuscated) -> SourceInDtype:
        """Reads W and transforms it again.

        The source raises ModelFileError where the files hold another W than before: it would not fit the
        transforms that are kept, and under these would show its difference.
        """
        R_in, R_out, wide, fingerprint = obfuscated.R_in, obfuscated.R_out, obfuscated.wide, obfuscated.fingerprint

        def make_again(dtype: torch.dtype) -> Tensor:
            W = self._read()
            if not fingerprint.is_of(W):
                raise ModelFileError(
                    f"the files hold other weights for {self._name} than when they were loaded: load anew"
                )
            return transform_in_place(as_fine_as(W, dtype), R_in, R_out, wide=wide).to(dtype)

        return make_again


class WeightFromSpillStore:
    """The first W_star lies on the enclave's disk, and W follows from it: rounded twice more.

    A 16-bit W comes back as it was, but for elements so small that float32 does not hold them beside the others.

    Every later W_star follows from that W, so that however often the model is re-keyed, it does not drift.
    """

    def __init__(self, spill_store: SpillStore) -> None:
        self._spill_store = spill_store
        self._kept: tuple[MatrixSource, Transform, Transform, torch.dtype] | None = None

    def weight(self) -> Tensor:
        """W (p, q), from what was first kept."""
        if self._kept is None:
            raise ProtectionError("nothing is kept yet")
        source, R_in, R_out, dtype = self._kept
        return restored(source(), R_in, R_out, dtype)

    def keep(self, obfuscated: Obfuscated) -> SourceInDtype:
        """Writes W_star to the spill store, the first time; then makes it again from what lies there."""
        R_in, R_out, wide = obfuscated.R_in, obfuscated.R_out, obfuscated.wide

        def make_again(dtype: torch.dtype) -> Tensor:
            return transform_in_place(as_fine_as(self.weight(), dtype), R_in, R_out, wide=wide).to(dtype)

        if self._kept is not None:
            return make_again
        spilled_in = obfuscated.W_star.dtype
        source = self._spill_store.keep(obfuscated.W_star)
        self._kept = source, R_in, R_out, obfuscated.dtype
        return lambda dtype: make_again(dtype) if is_finer(dtype, spilled_in) else source().to(dtype)


@dataclass
class Offloaded:
    """One group on the worker: W_star (p, q)."""

    name: str
    side: ResidualRole | None
    """The one side that is rotated, None for both."""
    weights: WeightSource
    crossing: SharedCrossing
    R_in: Transform
    R_out: Transform
    epoch: int = 0
    """How often its transforms were drawn anew."""
    observe: Callable[[Tensor, bool], None] | None = None
    """Called with the plain rows of each request; see `Observer.requested`."""

    @property
    def matrix_id(self) -> bytes:
        """Under which the worker holds W_star at present."""
        return self.crossing.matrix_id
