"""What each party of `guarded` holds, alone and together, put together from what both workers recorded.

    compute worker   X' = round(X*) + r      ->  a column of its own, under the profile's name
    mask worker      r                       ->  a column: the masks that were used
    both             X' - r = round(X*)      ->  a column: what is left if they collude

Neither worker is told which mask belongs to which request. Both find out: they hold the same matrices, and with the
right mask X' - r is small, where with another it is as large as a mask.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from obfuscatune.audit.attacks.view import SeenCall, WorkerView
from obfuscatune.errors import ProtectionError
from obfuscatune.protocol.tensors import content_digest

WINDOW = 2.0**16
"""Of the first element of X' - r. Rows are scaled, so it is below sqrt(m p); between two masks it is some 2^28."""
LARGEST = 16.0
"""Root mean square of X' - r: scaled rows and their shield rows have at most about 1."""


class Party(StrEnum):
    """Whose transcript is attacked."""

    COMPUTE = "compute worker"
    """The only worker, where a profile has no masks."""
    MASK = "mask worker"
    BOTH = "both"


def column(profile: str, party: Party) -> str:
    """The name under which a party's results stand: `guarded`, `guarded, mask worker`, `guarded, both`."""
    return profile if party is Party.COMPUTE else f"{profile}, {party}"


def of_column(name: str) -> tuple[str, Party]:
    """The profile and the party that a column is of."""
    profile, comma, party = name.partition(", ")
    return profile, Party(party) if comma else Party.COMPUTE


@dataclass(frozen=True)
class MaskAccount:
    """What was sent under masks in one run, and the most that any test on it can tell.

    Attributes:
        rows: sent under masks.
        advantage: at most, of any test on all that the compute worker received.
        budget: the largest advantage that is allowed.
    """

    rows: int
    advantage: float
    budget: float


class _Fits(NamedTuple):
    """Which masks may belong to a request."""

    matrix: int
    """Index of the compute worker's matrix."""
    transposed: bool
    rows: int


class _Place(NamedTuple):
    """Where a mask lies among those that fit, which are sorted by their first elements."""

    first: float
    call: int
    """The mask worker's."""
    row: int
    """Of the call: masks of few rows are drawn together."""


class _Masks:
    """The masks that the mask worker multiplied, by what they fit. Each is given away once."""

    def __init__(self, compute: WorkerView, masks: WorkerView) -> None:
        # Each worker knows a matrix by an id of its own.
        matrices = {content_digest(it.stored): index for index, it in enumerate(compute.matrices)}
        counterparts = [matrices.get(content_digest(it.stored)) for it in masks.matrices]
        self._by_matrix: defaultdict[tuple[int | None, bool], list[SeenCall]] = defaultdict(list)
        for call in masks.calls:
            self._by_matrix[counterparts[call.matrix], call.transposed].append(call)
        self._calls = masks.calls
        self._sorted: dict[_Fits, list[_Place]] = {}

    def take(self, call: SeenCall) -> SeenCall:
        """The mask that the rows of a request were hidden under.

        Raises:
            ProtectionError: there is none.
        """
        known = self._that_fit(_Fits(call.matrix, call.transposed, call.count))
        first = float(call.sent[0, 0])
        begin, end = bisect_left(known, (first - WINDOW,)), bisect_right(known, (first + WINDOW,))
        masks = {index: self._mask(known[index], call.count) for index in range(begin, end)}
        sizes = {index: float((call.sent - mask.sent).square().mean().sqrt()) for index, mask in masks.items()}
        best = min(sizes, key=sizes.__getitem__, default=None)
        if best is None or sizes[best] > LARGEST:
            raise ProtectionError(
                f"request {call.index} of the compute worker, {call.count} rows for layer {call.layer}, is hidden "
                f"under none of the {len(known)} masks that fit it and that the mask worker multiplied"
            )
        del known[best]
        return masks[best]

    def _that_fit(self, fits: _Fits) -> list[_Place]:
        if fits not in self._sorted:
            self._sorted[fits] = sorted(
                _Place(float(first), call.index, index * fits.rows)
                for call in self._by_matrix[fits.matrix, fits.transposed]
                if call.count % fits.rows == 0
                for index, first in enumerate(call.sent[:: fits.rows, 0])
            )
        return self._sorted[fits]

    def _mask(self, place: _Place, rows: int) -> SeenCall:
        call = self._calls[place.call]
        return replace(call, sent=call.sent[place.row : place.row + rows])


def part_views(compute: WorkerView, masks: WorkerView) -> dict[Party, WorkerView]:
    """What each party sees, and both together: three views whose calls are in one order.

    The mask worker alone does not know which masks were used, and in what order. Its view here has them aligned with
    the requests that they were used for, and without those that were never used: more than it knows.

    Args:
        compute: all that the compute worker saw.
        masks: all that the mask worker saw, where the layers of calls need not be right.

    Raises:
        ProtectionError: a request is hidden under no mask that the mask worker multiplied.
    """
    known = _Masks(compute, masks)
    pairs = [(call, known.take(call)) for call in compute.calls]
    alone = tuple(replace(call, sent=mask.sent, awaited_ns=mask.awaited_ns) for call, mask in pairs)
    together = tuple(replace(call, mask=mask.sent) for call, mask in pairs)
    return {
        Party.COMPUTE: compute,
        Party.MASK: replace(compute, calls=alone),
        Party.BOTH: replace(compute, calls=together),
    }
