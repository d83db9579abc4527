"""What a member of a fleet is asked to do."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from obfuscatune.enclave.fleet.link import MemberLink
    from obfuscatune.enclave.fleet.request import FleetProduct
    from obfuscatune.enclave.fleet.shards import StoredShard


@dataclass(eq=False)
class Part:
    """The part of a product that one shard makes. Any holder may answer; the first answer counts."""

    request: FleetProduct
    shard: StoredShard
    rows: Tensor
    dtype: torch.dtype
    """Of the answer."""
    transpose: bool
    answer: Tensor | None = None
    answered_by: MemberLink | None = None
    asked: list[MemberLink] = field(default_factory=list)
    """Who was asked and has neither answered nor failed."""
    refused_by: set[MemberLink] = field(default_factory=set)
    """Who answered with an error."""
    due: float = 0.0
    """When another is to be asked too; while nobody can be asked, when that is given up."""

    @property
    def work(self) -> int:
        """Multiplications."""
        return self.rows.shape[0] * self.shard.rows * self.shard.columns

    @property
    def kind(self) -> int:
        """Parts of one kind take about the same time."""
        return self.work.bit_length()


@dataclass(eq=False)
class Upload:
    """A shard that a member is to hold."""

    shard: StoredShard
    elements: Tensor | None = None
    """The shard, where it is at hand; until the upload is done."""
    displaces: MemberLink | None = None
    """Who is to forget the shard afterwards."""
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


@dataclass(eq=False)
class Forget:
    """A shard that a member needs no more."""

    shard_id: bytes


@dataclass(eq=False)
class Join:
    """Connect, and measure how fast the member multiplies."""

    forget: list[bytes] = field(default_factory=list)
    """Shards that it held when it was left, and is to hold no more."""


Job = Part | Upload | Forget | Join
now = time.monotonic
