"""Who holds which shards: the fleet's matrices, kept as placement has them while members come and go.

Everything here is called under the fleet's lock, and waits for nothing: members' threads do the uploads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from obfuscatune.enclave.fleet.jobs import Forget, Part, Upload
from obfuscatune.enclave.fleet.link import MemberLink, State
from obfuscatune.enclave.fleet.shards import FleetMatrix, StoredShard
from obfuscatune.errors import QuotaExceeded, WireError
from obfuscatune.fleet.placement import MatrixSize, Plan, Seat, Shard, place_next, rearrange

NEARLY_EQUAL = 1.6
"""Speeds that differ by less are taken for equal: a measurement is no more exact, and what is placed alike stays."""


class Holdings:
    """The matrices of a fleet."""

    def __init__(self, links: dict[str, MemberLink], plan: Plan, notice: Callable[[str], None]) -> None:
        """
        Args:
            links: of the members, by name; the fleet's own.
            plan: how matrices are placed.
            notice: is told where there is no room.
        """
        self.matrices: dict[bytes, FleetMatrix] = {}
        self.moved = 0
        self._links, self._plan, self._notice = links, plan, notice

    @property
    def active(self) -> list[MemberLink]:
        """Members that can be asked now."""
        return [link for link in self._links.values() if link.state is State.ACTIVE]

    @property
    def shards(self) -> list[StoredShard]:
        """Of all matrices."""
        return [shard for matrix in self.matrices.values() for shard in matrix.shards]

    def place(self, matrix: FleetMatrix, tensor: Tensor | None) -> list[Upload]:
        """Have one more matrix sent, from `tensor` where it is at hand.

        Raises:
            QuotaExceeded: there is no room for it.
        """
        placed = [shard.placed() for shard in self.shards]
        uploads: list[Upload] = []
        for shard in place_next(matrix.size, placed, self._sizes(), self._seats(), self._plan):
            stored = StoredShard(matrix, shard.first, shard.last)
            matrix.shards.append(stored)
            elements = None if tensor is None else stored.elements(tensor)
            uploads += [self._upload(stored, self._links[name], elements) for name in shard.holders]
        self.matrices[matrix.matrix_id] = matrix
        return uploads

    def forget(self, matrix_id: bytes) -> None:
        """Have a matrix forgotten by all."""
        matrix = self.matrices.pop(matrix_id, None)
        for shard in [] if matrix is None else matrix.shards:
            for link in shard.holders:
                link.put(Forget(shard.shard_id))

    def held(self, link: MemberLink, upload: Upload) -> list[Part]:
        """A member was sent a shard, or refused it; what waited for the shard and can be asked now."""
        shard = upload.shard
        if link not in shard.coming:
            return []
        shard.coming.remove(link)
        if upload.error is not None and not isinstance(upload.error, WireError):
            for part in shard.waiting:  # W_star cannot be had again, by nobody's fault but ours
                part.request.error = upload.error
                part.request.arrived.set()
            return []
        if upload.error is not None:
            link.full_at = sum(it.nbytes for it in self.shards if link in it.holders)
            return self.rearranged()
        if shard.matrix.matrix_id not in self.matrices:
            link.put(Forget(shard.shard_id))
            return []
        shard.holders.append(link)
        if upload.displaces in shard.holders:
            shard.holders.remove(upload.displaces)
            upload.displaces.put(Forget(shard.shard_id))
        waiting, shard.waiting = shard.waiting, []
        return waiting

    def without(self, link: MemberLink) -> list[Part]:
        """A member is left: others are sent what it held. What waits and must be asked in other parts now."""
        for shard in self.shards:
            if link in shard.holders or link in shard.coming:
                link.to_forget.append(shard.shard_id)
                shard.holders[:] = [it for it in shard.holders if it is not link]
                shard.coming[:] = [it for it in shard.coming if it is not link]
        return self.rearranged()

    def rearranged(self, joining: Sequence[str] = ()) -> list[Part]:
        """Have shards sent to where they are to be now. What waits and must be asked in other parts now."""
        seats = self._seats()
        if not self.matrices or not seats:
            return []
        try:
            after = rearrange([it.placed() for it in self.shards], self._sizes(), seats, self._plan, joining)
        except QuotaExceeded as error:
            self._notice(f"{error}: part of the model is nowhere now, and what needs it waits")
            return []
        planned: dict[str, list[Shard]] = {}
        for shard in after:
            planned.setdefault(shard.matrix, []).append(shard)
        return [part for matrix in self.matrices.values() for part in self._follow(matrix, planned[matrix.size.name])]

    def _follow(self, matrix: FleetMatrix, planned: Iterable[Shard]) -> list[Part]:
        """Have the shards of one matrix sent as planned; those that are cut there are replaced."""
        by_first = {shard.first: shard for shard in matrix.shards}
        shards: list[StoredShard] = []
        cut: list[StoredShard] = []
        for shard in planned:
            stored = by_first.get(shard.first)
            if stored is None or stored.last != shard.last:
                cut += [] if stored is None else [stored]
                stored = StoredShard(matrix, shard.first, shard.last)
                cut[-1].replaced_by.append(stored)
            shards.append(stored)
            self._send_to(stored, shard.holders)
        matrix.shards = shards
        return [part for shard in cut for part in shard.waiting]

    def _send_to(self, stored: StoredShard, holders: Sequence[str]) -> None:
        have = {link.name for link in (*stored.holders, *stored.coming)}
        surplus = [link for link in stored.holders if link.name not in holders]
        for name in holders:
            if name not in have:
                self._upload(stored, self._links[name]).displaces = surplus.pop() if surplus else None
                self.moved += 1

    def _upload(self, shard: StoredShard, link: MemberLink, elements: Tensor | None = None) -> Upload:
        upload = Upload(shard, elements)
        shard.coming.append(link)
        link.put(upload)
        return upload

    def _seats(self) -> list[Seat]:
        """Of the members that can be asked; speeds over the median, those near it taken for equal."""
        seats = [link.seat() for link in self.active]
        if not seats:
            return []
        median = sorted(seat.speed for seat in seats)[(len(seats) - 1) // 2]
        near = (1 / NEARLY_EQUAL, NEARLY_EQUAL)
        ratios = [seat.speed / median for seat in seats]
        return [
            replace(seat, speed=1.0 if near[0] <= ratio <= near[1] else min(max(ratio, 1 / 16), 16.0))
            for seat, ratio in zip(seats, ratios, strict=True)
        ]

    def _sizes(self) -> dict[str, MatrixSize]:
        return {matrix.size.name: matrix.size for matrix in self.matrices.values()}
