"""A matrix in shards, and who holds them."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obfuscatune.enclave.client import MatrixSource
from obfuscatune.fleet.placement import MatrixSize, Shard
from obfuscatune.protocol.tensors import DType

if TYPE_CHECKING:
    from obfuscatune.enclave.fleet.jobs import Part
    from obfuscatune.enclave.fleet.link import MemberLink


@dataclass(eq=False)
class StoredShard:
    """Columns `first` to `last` of a matrix, as workers hold them: under an id of their own."""

    matrix: FleetMatrix
    first: int
    last: int
    shard_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    holders: list[MemberLink] = field(default_factory=list)
    """Who has it and can be asked."""
    coming: list[MemberLink] = field(default_factory=list)
    """Who is being sent it."""
    waiting: list[Part] = field(default_factory=list)
    """What is asked once there is a holder."""
    replaced_by: list[StoredShard] = field(default_factory=list)
    """The shards that it was cut into, when no worker left had room for it."""

    @property
    def rows(self) -> int:
        """p of W* (p, q)."""
        return self.matrix.shape[0]

    @property
    def columns(self) -> int:
        """How many."""
        return self.last - self.first

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.columns * self.matrix.size.column_bytes

    def elements(self, W_star: Tensor | None = None) -> Tensor:
        """Its columns, contiguous, of W_star, which is made again where it is not at hand."""
        W_star = self.matrix.elements() if W_star is None else W_star
        return W_star[:, self.first : self.last].contiguous()

    def placed(self) -> Shard:
        """As placement sees it: who is being sent it holds it."""
        holders = dict.fromkeys(link.name for link in (*self.holders, *self.coming))
        return Shard(self.matrix.size.name, self.first, self.last, tuple(holders))


@dataclass(eq=False)
class FleetMatrix:
    """W_star as the fleet remembers it: not its elements, but how to have them again."""

    matrix_id: bytes
    source: MatrixSource
    shape: tuple[int, int]
    dtype: torch.dtype
    widths: tuple[int, ...] = ()
    shards: list[StoredShard] = field(default_factory=list)
    _making: threading.Lock = field(default_factory=threading.Lock)

    @property
    def size(self) -> MatrixSize:
        """As placement sees it."""
        return MatrixSize(self.matrix_id.hex(), *self.shape, DType.of(self.dtype).itemsize)

    def elements(self) -> Tensor:
        """W_star (p, q), made again."""
        with self._making:
            return self.source()

    def whole(self, shard: StoredShard) -> bool:
        """Whether a shard is all of the matrix."""
        return shard.columns == self.shape[1]
