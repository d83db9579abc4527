"""Decides which worker holds which columns of which matrix: a pure function of sizes, memory and speeds.

A matrix W* (p, q) is cut into *shards*, ranges of its columns. Each shard has `replicas` holders, any of which may
multiply by it. The columns that a worker gets are proportional to its speed, as far as its memory goes:

    widths     x_m <= min(q, memory), proportional to speed, sum of x_m = replicas * q
    cyclic     worker after worker takes the next x_m columns of a circle of q: each column `replicas` times, and,
               since x_m <= q, never twice by the same worker (McNaughton's wrap-around rule, 1959)
    shards     the pieces between all cuts

When a worker leaves, what it held goes to others and nothing else moves. When one joins, it takes over shards of those
that are loaded most, until it is loaded as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from obfuscatune.errors import ConfigError, QuotaExceeded

CUT_COLUMNS = 16
"""Cuts lie at multiples of it: a narrower shard costs a worker as much time."""
LEAST_COLUMNS = 64
"""A matrix is cut for no more workers than get that many columns of it each."""
ALL = 0
"""As `Plan.replicas`: every worker holds every matrix, as far as its memory goes."""


@dataclass(frozen=True)
class Plan:
    """What a user asks of a placement."""

    replicas: int = 1
    """Holders of each column; `ALL` for every worker."""
    shard: bool = True
    """Whether matrices may be cut."""
    least_columns: int = LEAST_COLUMNS

    def __post_init__(self) -> None:
        if self.replicas < 0 or self.least_columns < 1:
            raise ConfigError("a placement has one replica or more, of one column or more")


@dataclass(frozen=True)
class Seat:
    """A worker, as far as a placement is concerned."""

    name: str
    memory: int | None = None
    """Bytes for matrices; None where no bound is known."""
    speed: float = 1.0
    """In any unit, the same for all."""


@dataclass(frozen=True)
class MatrixSize:
    """A matrix (rows, cols) that is to be placed."""

    name: str
    rows: int
    cols: int
    itemsize: int = 4

    @property
    def column_bytes(self) -> int:
        """Of one column."""
        return self.rows * self.itemsize


@dataclass(frozen=True)
class Shard:
    """Columns `first` to `last` of a matrix, and who holds them."""

    matrix: str
    first: int
    last: int
    holders: tuple[str, ...]

    @property
    def columns(self) -> int:
        """How many."""
        return self.last - self.first


def place(matrices: Sequence[MatrixSize], seats: Sequence[Seat], plan: Plan) -> list[Shard]:
    """Shards of all matrices, one matrix after the other, each in the order of its columns.

    Raises:
        QuotaExceeded: the workers have no room for all columns once.
    """
    load = _Load(seats)
    return [shard for matrix in matrices for shard in load.spread(matrix, 0, matrix.cols, plan)]


def place_next(
    matrix: MatrixSize, placed: Iterable[Shard], sizes: Mapping[str, MatrixSize], seats: Sequence[Seat], plan: Plan
) -> list[Shard]:
    """Shards of one more matrix beside those that are `placed`; `sizes` has their matrices.

    Raises:
        QuotaExceeded: see `place`.
    """
    return _Load(seats, placed, sizes).spread(matrix, 0, matrix.cols, plan)


def rearrange(
    placed: Sequence[Shard],
    sizes: Mapping[str, MatrixSize],
    seats: Sequence[Seat],
    plan: Plan,
    joining: Collection[str] = (),
) -> list[Shard]:
    """The placement after workers have left or joined. Shards whose workers stay, stay, but for what `joining` take.

    A shard that has a holder left and for whose other replicas nobody has room keeps fewer than the plan says.

    Args:
        placed: the shards before.
        sizes: the matrices, by name.
        seats: the workers that are there now.
        plan: see `Plan`.
        joining: names of those that take over from others.

    Raises:
        QuotaExceeded: a shard that no worker holds any more has room nowhere.
    """
    here = {seat.name for seat in seats}
    kept = [replace(shard, holders=tuple(name for name in shard.holders if name in here)) for shard in placed]
    load = _Load(seats, [shard for shard in kept if shard.holders], sizes)
    after: list[Shard] = []
    for shard in kept:
        if shard.holders:
            after.append(shard)
        else:
            after += load.spread(sizes[shard.matrix], shard.first, shard.last, plan)
    after = [load.filled_up(shard, plan) for shard in after]
    for name in joining:
        if name in here:
            after = load.levelled(after, name)
    return after


class _Load:
    """What each worker holds, as a placement grows."""

    def __init__(
        self, seats: Sequence[Seat], placed: Iterable[Shard] = (), sizes: Mapping[str, MatrixSize] | None = None
    ) -> None:
        if not seats:
            raise QuotaExceeded("the fleet has no worker left that a matrix could be sent to")
        self._seats = {seat.name: seat for seat in seats}
        self._sizes = dict(sizes or {})
        self._bytes: dict[str, int] = dict.fromkeys(self._seats, 0)
        self._columns: defaultdict[tuple[str, str], int] = defaultdict(int)
        """By matrix and worker."""
        for shard in placed:
            for name in shard.holders:
                self._add(shard, name)

    def spread(self, matrix: MatrixSize, first: int, last: int, plan: Plan) -> list[Shard]:
        """Cut and place columns `first` to `last`, which nobody holds."""
        self._sizes[matrix.name] = matrix
        unit = CUT_COLUMNS if plan.shard else last - first
        units = -(-(last - first) // unit)
        room = {name: min(units, self._room(name) // (unit * matrix.column_bytes)) for name in self._by_load(matrix)}
        room = {name: most for name, most in room.items() if most}
        wanted = min(plan.replicas or len(self._seats), len(room))
        while wanted and wanted * units > sum(room.values()):
            wanted -= 1
        if not wanted:
            raise QuotaExceeded(
                f"the fleet has no room for a matrix of {matrix.rows} x {last - first} ({matrix.itemsize} bytes an "
                f"element){'' if plan.shard else ' in one piece: let matrices be cut by shard: auto'}; add workers, or "
                "memory"
            )
        total = wanted * units
        count = max(wanted, min(len(room), wanted * (last - first) // plan.least_columns)) if plan.shard else wanted
        chosen = list(room)[:count]
        while sum(room[name] for name in chosen) < total:
            chosen = list(room)[: len(chosen) + 1]
        chosen.sort()
        widths = _proportional(total, {name: (self._seats[name].speed, room[name]) for name in chosen})
        shards = [
            replace(shard, first=first + shard.first * unit, last=min(last, first + shard.last * unit))
            for shard in _cyclic(matrix.name, units, widths)
        ]
        for shard in shards:
            for name in shard.holders:
                self._add(shard, name)
        return shards

    def filled_up(self, shard: Shard, plan: Plan) -> Shard:
        """The shard with as many holders as the plan says, as far as there is room."""
        matrix = self._sizes[shard.matrix]
        wanted = min(plan.replicas or len(self._seats), len(self._seats))
        nbytes = shard.columns * matrix.column_bytes
        for name in self._by_load(matrix):
            if len(shard.holders) >= wanted:
                break
            if name not in shard.holders and self._room(name) >= nbytes:
                shard = replace(shard, holders=(*shard.holders, name))
                self._add(shard, name)
        return shard

    def levelled(self, shards: list[Shard], name: str) -> list[Shard]:
        """Shards after `name` took over, of each at most once, what makes a more loaded worker less loaded."""
        moves = [(self._priority(shard, donor), index, donor) for index, shard in enumerate(shards) for donor in
                 shard.holders]  # fmt: skip
        for _, index, donor in sorted(moves, key=lambda move: (-move[0][0], -move[0][1], move[1], move[2])):
            shard = shards[index]
            if donor in shard.holders and name not in shard.holders and self._is_better(shard, donor, name):
                self._add(shard, donor, -1)
                shards[index] = replace(shard, holders=tuple(name if it == donor else it for it in shard.holders))
                self._add(shard, name)
        return shards

    def _is_better(self, shard: Shard, donor: str, name: str) -> bool:
        """Whether the larger of two loads falls, and that by the shard's own matrix does not rise."""
        nbytes = shard.columns * self._sizes[shard.matrix].column_bytes
        there, here = self._seats[donor], self._seats[name]
        if self._room(name) < nbytes or (self._bytes[name] + nbytes) / here.speed >= self._bytes[donor] / there.speed:
            return False
        of_donor, own = self._columns[shard.matrix, donor], self._columns[shard.matrix, name]
        alone = of_donor == shard.columns and not own
        return alone or (own + shard.columns) / here.speed <= of_donor / there.speed

    def _priority(self, shard: Shard, donor: str) -> tuple[float, float]:
        """How much it helps that `donor` gives a shard away: of its matrix first, then of all that it holds."""
        speed = self._seats[donor].speed
        return self._columns[shard.matrix, donor] / self._sizes[shard.matrix].cols / speed, self._bytes[donor] / speed

    def _by_load(self, matrix: MatrixSize) -> list[str]:
        """Workers, those first that are loaded least: by this matrix, then by all that they hold."""
        return sorted(
            self._seats,
            key=lambda name: (
                self._columns[matrix.name, name] / self._seats[name].speed,
                self._bytes[name] / self._seats[name].speed,
                name,
            ),
        )

    def _room(self, name: str) -> int:
        memory = self._seats[name].memory
        return _BOUNDLESS if memory is None else memory - self._bytes[name]

    def _add(self, shard: Shard, name: str, sign: int = 1) -> None:
        self._bytes[name] += sign * shard.columns * self._sizes[shard.matrix].column_bytes
        self._columns[shard.matrix, name] += sign * shard.columns


_BOUNDLESS = 1 << 62


def _proportional(total: int, shares: Mapping[str, tuple[float, int]]) -> dict[str, int]:
    """`total` units in proportion to speeds, none above its bound; `shares` has speed and bound by name.

    Who has reached its bound is left at it, and the others share what remains; then rounded by largest remainders.
    """
    exact: dict[str, float] = {}
    rest, left = dict(shares), float(total)
    while rest:
        speed = sum(it[0] for it in rest.values())
        full = {name: it[1] for name, it in rest.items() if left * it[0] / speed >= it[1]}
        if not full:
            exact |= {name: left * it[0] / speed for name, it in rest.items()}
            break
        exact |= full
        left -= sum(full.values())
        rest = {name: it for name, it in rest.items() if name not in full}
    widths = {name: min(int(exact[name]), shares[name][1]) for name in shares}
    order = sorted(shares, key=lambda name: (int(exact[name]) - exact[name], name))
    while (missing := total - sum(widths.values())) > 0:
        for name in [it for it in order if widths[it] < shares[it][1]][:missing]:
            widths[name] += 1
    return widths


def _cyclic(matrix: str, units: int, widths: Mapping[str, int]) -> list[Shard]:
    """Shards, in units: each worker takes the next of a circle, and cuts are where a worker begins or ends."""
    ranges: list[tuple[int, int, str]] = []
    begin = 0
    for name, width in widths.items():
        end = begin + width
        ranges.append((begin, min(end, units), name))
        if end > units:
            ranges.append((0, end - units, name))
        begin = end % units
    cuts = sorted({0, units, *(edge for first, last, _ in ranges for edge in (first, last))})
    shards: list[Shard] = []
    for first, last in pairwise(cuts):
        holders = tuple(name for start, end, name in ranges if start <= first and last <= end)
        if shards and set(shards[-1].holders) == set(holders):
            shards[-1] = replace(shards[-1], last=last)
        else:
            shards.append(Shard(matrix, first, last, holders))
    return shards
