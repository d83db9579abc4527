"""A product asked of a fleet: in parts, each from whoever answers first, put together in the enclave.

    forward    Y*  = [X* W*_1, X* W*_2, ...]                 columns side by side
    backward   D*  = G*_1 W*_1ᵀ + G*_2 W*_2ᵀ + ...           summed in the order of the columns, whoever was first

A sum of 16-bit products is of products in float32, rounded once.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from obfuscatune.enclave.fleet.jobs import Part
from obfuscatune.enclave.fleet.shards import FleetMatrix, StoredShard
from obfuscatune.enclave.verification import MARGIN

if TYPE_CHECKING:
    from obfuscatune.enclave.fleet.link import MemberLink


class Attendant(Protocol):
    """The fleet, as a product that is waited for sees it."""

    def attend(self, product: FleetProduct) -> float:
        """Ask others what is overdue; for how many seconds nothing is to be done for it then.

        Raises:
            WireError: nobody can be asked.
        """


class FleetProduct:
    """See `PendingProduct`."""

    def __init__(
        self, fleet: Attendant, matrix: FleetMatrix, rows: Tensor, dtype: torch.dtype, *, transpose: bool
    ) -> None:
        self.rows, self.dtype = rows, dtype
        self.matrix, self.transpose = matrix, transpose
        self.error: Exception | None = None
        self.arrived = threading.Event()
        """Something is to be looked at."""
        self.parts = [self._part(shard) for shard in matrix.shards]
        self._fleet = fleet
        self._product: Tensor | None = None

    @property
    def undone(self) -> list[Part]:
        """Parts that have no answer."""
        return [part for part in self.parts if part.answer is None]

    def result(self) -> Tensor:
        """Wait for the product: (m, q), or (m, p) when transposed; on the CPU, the caller's own.

        Raises:
            WireError: no member could be asked for so long as the fleet is patient, or all refused.
        """
        while self._product is None:
            self.arrived.clear()
            seconds = self._fleet.attend(self)
            if self.error is not None:
                raise self.error
            if self.undone:
                self.arrived.wait(seconds)
            else:
                self._product = self._joined()
        return self._product

    def own(self, product: Tensor) -> Tensor:
        """The product itself: no worker can write to it."""
        return product

    def split(self, part: Part) -> list[Part]:
        """New parts in the place of one whose shard was cut."""
        parts = [self._part(shard) for shard in part.shard.replaced_by]
        index = self.parts.index(part)
        self.parts[index : index + 1] = parts
        return parts

    def doubtful(self, link: MemberLink) -> list[Part]:
        """Parts, of a product that nobody has taken yet, whose answer is that of a member found to be wrong: undone."""
        parts = [part for part in self.parts if part.answered_by is link and self._product is None]
        for part in parts:
            part.answer = part.answered_by = None
        return parts

    def wrong_members(self, W_star: Tensor) -> list[tuple[MemberLink, float]]:
        """Who sent a part that is not what the enclave computes, and by how much beyond rounding; the worst first.

        Where rounding explains each part alone, it is the one that is furthest off.
        """
        found: list[tuple[MemberLink, float]] = []
        for part in self.parts:
            if part.answer is not None and part.answered_by is not None:
                found.append((part.answered_by, _excess(part, part.shard.elements(W_star).double())))
        found.sort(key=lambda it: it[1], reverse=True)
        return [it for it in found if not it[1] <= 1] or found[:1]

    def computed(self, W_star: Tensor) -> Tensor:
        """The product, computed here."""
        width = self.matrix.shape[0] if self.transpose else self.matrix.shape[1]
        product = torch.zeros(self.rows.shape[0], width, dtype=torch.float64)
        for part in self.parts:
            W = part.shard.elements(W_star).double()
            if self.transpose:
                product += part.rows.double() @ W.T
            else:
                product[:, part.shard.first : part.shard.last] = part.rows.double() @ W
        return product.to(self.dtype)

    def _part(self, shard: StoredShard) -> Part:
        whole = self.matrix.whole(shard)
        rows = self.rows[:, shard.first : shard.last].contiguous() if self.transpose and not whole else self.rows
        is_summed = self.transpose and not whole
        return Part(self, shard, rows, torch.promote_types(self.dtype, torch.float32) if is_summed else self.dtype,
                    self.transpose)  # fmt: skip

    def _joined(self) -> Tensor:
        answers = [part.answer for part in self.parts if part.answer is not None]
        if len(answers) == 1:
            return answers[0]
        if not self.transpose:
            return torch.cat(answers, dim=1)
        total = answers[0].clone()
        for answer in answers[1:]:
            total += answer
        return total.to(self.dtype)


def _excess(part: Part, W: Tensor) -> float:
    """How far a part is off in its worst row, over what rounding explains; see `verification` for the formula."""
    if part.answer is None:
        return 0.0
    rows, came = part.rows.double(), part.answer.double()
    off = torch.linalg.vector_norm(came - rows @ (W.T if part.transpose else W), dim=1)
    unit = MARGIN[part.dtype] * torch.finfo(part.dtype).eps / 2
    allowed = unit * torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(W) + torch.finfo(part.dtype).tiny
    excess = float((off / allowed).max())
    return excess if excess == excess else float("inf")  # NaN is worse than anything
