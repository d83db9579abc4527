"""Where matrices go: every column as often as asked, no worker over its memory, and little moves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from obfuscatune.errors import QuotaExceeded
from obfuscatune.fleet.placement import ALL, CUT_COLUMNS, MatrixSize, Plan, Seat, Shard, place, place_next, rearrange

speeds = st.sampled_from([0.5, 1.0, 1.0, 1.4, 2.0, 4.0])
seats = st.lists(st.tuples(speeds, st.one_of(st.none(), st.integers(0, 200_000))), min_size=1, max_size=9).map(
    lambda them: [Seat(f"tcp:w{i}:7600", memory, speed) for i, (speed, memory) in enumerate(them)]
)
matrices = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 700)), min_size=1, max_size=6).map(
    lambda them: [MatrixSize(f"m{i}", rows, cols) for i, (rows, cols) in enumerate(them)]
)
plans = st.builds(
    Plan, replicas=st.sampled_from([1, 1, 2, 3, ALL]), shard=st.booleans(), least_columns=st.sampled_from([1, 32, 64])
)


def held(shards: list[Shard], sizes: list[MatrixSize]) -> Counter[str]:
    """Bytes by worker."""
    of = {it.name: it for it in sizes}
    counts: Counter[str] = Counter()
    for shard in shards:
        for name in shard.holders:
            counts[name] += shard.columns * of[shard.matrix].column_bytes
    return counts


def check(shards: list[Shard], sizes: list[MatrixSize], workers: list[Seat]) -> None:
    """All columns are held, in order, by different workers each, and nobody holds more than has room."""
    for matrix in sizes:
        own = [shard for shard in shards if shard.matrix == matrix.name]
        assert [shard.first for shard in own] == [0, *(shard.last for shard in own[:-1])]
        assert own[-1].last == matrix.cols
        for shard in own:
            assert shard.columns >= 1
            assert len(set(shard.holders)) == len(shard.holders) >= 1
    total = held(shards, sizes)
    assert set(total) <= {seat.name for seat in workers}
    for seat in workers:
        assert seat.memory is None or total[seat.name] <= seat.memory


def placed_or_skipped(sizes: list[MatrixSize], workers: list[Seat], plan: Plan) -> list[Shard]:
    try:
        return place(sizes, workers, plan)
    except QuotaExceeded:
        assume(False)
        raise


@given(matrices, seats, plans)
def test_every_column_is_held_and_nobody_holds_more_than_has_room(
    sizes: list[MatrixSize], workers: list[Seat], plan: Plan
) -> None:
    shards = placed_or_skipped(sizes, workers, plan)
    check(shards, sizes, workers)
    assert shards == place(sizes, workers, plan), "the same again"
    if not plan.shard:
        assert len(shards) == len(sizes)


@given(matrices, seats, plans)
def test_where_memory_allows_each_column_has_its_replicas(
    sizes: list[MatrixSize], workers: list[Seat], plan: Plan
) -> None:
    workers = [Seat(seat.name, None, seat.speed) for seat in workers]
    wanted = min(plan.replicas or len(workers), len(workers))
    for shard in place(sizes, workers, plan):
        assert len(shard.holders) == wanted


@given(st.integers(64, 4096), seats, st.integers(1, 3))
def test_widths_are_proportional_to_speed(cols: int, workers: list[Seat], replicas: int) -> None:
    """Where no bound is met, a worker's columns are its share, to within one cut."""
    workers = [Seat(seat.name, None, seat.speed) for seat in workers]
    replicas = min(replicas, len(workers))
    matrix = MatrixSize("m", 8, cols)
    total = sum(seat.speed for seat in workers)
    shares = {seat.name: replicas * cols * seat.speed / total for seat in workers}
    assume(max(shares.values()) <= cols - CUT_COLUMNS)
    columns = held(place([matrix], workers, Plan(replicas, least_columns=1)), [matrix])
    for name, share in shares.items():
        assert abs(columns[name] / matrix.column_bytes - share) <= 2 * CUT_COLUMNS


@given(st.integers(4, 128), seats, st.integers(1, 3))
def test_who_has_no_room_for_its_share_has_all_that_fits_and_the_others_share_the_rest(
    cuts: int, workers: list[Seat], replicas: int
) -> None:
    matrix = MatrixSize("m", 64, cuts * CUT_COLUMNS)
    of_cut = CUT_COLUMNS * matrix.column_bytes
    shards = placed_or_skipped([matrix], workers, Plan(replicas, least_columns=1))
    (holders,) = {len(shard.holders) for shard in shards}
    assert holders <= replicas, "no column has more than its replicas"
    load = held(shards, [matrix])
    widths = {seat: load[seat.name] // of_cut for seat in workers}
    rooms = {seat: cuts if seat.memory is None else min(cuts, seat.memory // of_cut) for seat in workers}
    for seat in workers:
        if widths[seat] < rooms[seat]:  # nobody has more for its speed than who has room left, but for rounding
            for other in workers:
                assert (widths[other] - 1) / other.speed <= (widths[seat] + 1) / seat.speed


@given(matrices, seats, plans, st.data())
def test_when_a_worker_leaves_only_what_it_held_moves(
    sizes: list[MatrixSize], workers: list[Seat], plan: Plan, data: st.DataObject
) -> None:
    assume(len(workers) > 1)
    before = placed_or_skipped(sizes, workers, plan)
    gone = data.draw(st.sampled_from(workers)).name
    left = [seat for seat in workers if seat.name != gone]
    try:
        after = rearrange(before, {it.name: it for it in sizes}, left, plan)
    except QuotaExceeded:
        return
    check(after, sizes, left)
    holders_before = {(shard.matrix, c): set(shard.holders) for shard in before for c in range(shard.first, shard.last)}
    for shard in after:
        for column in range(shard.first, shard.last):
            was = holders_before[shard.matrix, column]
            assert was - {gone} <= set(shard.holders), "nobody is told to forget"
            if gone not in was and len(was) >= min(plan.replicas or 99, len(left)):
                assert set(shard.holders) == was, "what it did not hold stays where it is"


@given(matrices, seats, st.integers(1, 3))
def test_who_joins_takes_from_the_most_loaded(sizes: list[MatrixSize], workers: list[Seat], replicas: int) -> None:
    workers = [Seat(seat.name, None, seat.speed) for seat in workers]
    assume(len(workers) > replicas)
    of, plan = {it.name: it for it in sizes}, Plan(replicas)
    before = place(sizes, workers[1:], plan)
    after = rearrange(before, of, workers, plan, joining=[workers[0].name])
    check(after, sizes, workers)
    joined = workers[0].name
    for old, new in zip(before, after, strict=True):
        assert (new.matrix, new.first, new.last) == (old.matrix, old.first, old.last), "nothing is cut again"
        assert set(new.holders) - set(old.holders) <= {joined}, "nobody else takes anything"
        assert len(new.holders) == len(old.holders)
    load_before, load_after = (held(it, sizes) for it in (before, after))
    speed = {seat.name: seat.speed for seat in workers}
    highest = max(load_before[name] / speed[name] for name in speed)
    assert max(load_after[name] / speed[name] for name in speed) <= highest


@given(st.integers(2, 8), st.integers(1, 8))
def test_after_one_left_and_came_back_all_are_loaded_as_before(count: int, layers: int) -> None:
    workers = [Seat(f"w{i}") for i in range(count)]
    sizes = [MatrixSize(f"m{i}", 32, 64 * count) for i in range(layers)]
    of, plan = {it.name: it for it in sizes}, Plan()
    before = place(sizes, workers, plan)
    without = rearrange(before, of, workers[1:], plan)
    after = rearrange(without, of, workers, plan, joining=["w0"])
    for matrix in sizes:
        own = [shard for shard in after if shard.matrix == matrix.name]
        assert sorted(held(own, sizes).values()) == sorted(held(before, sizes)[f"w{i}"] // layers for i in range(count))


def test_a_matrix_larger_than_any_worker_fits_in_all_of_them() -> None:
    matrix = MatrixSize("m", 1000, 1000)
    workers = [Seat(f"w{i}", memory=1_100_000) for i in range(4)]
    shards = place([matrix], workers, Plan())
    check(shards, [matrix], workers)
    assert len(shards) == 4
    with pytest.raises(QuotaExceeded, match="add workers, or memory"):
        place([matrix], workers[:3], Plan())
    with pytest.raises(QuotaExceeded, match="shard: auto"):
        place([matrix], workers, Plan(shard=False))


def test_matrices_that_are_not_cut_are_dealt_out() -> None:
    workers = [Seat(f"w{i}") for i in range(3)]
    sizes = [MatrixSize(f"m{i}", 8, 100) for i in range(6)]
    counts = Counter(shard.holders for shard in place(sizes, workers, Plan(shard=False)))
    assert set(counts.values()) == {2}


@given(matrices, seats, plans)
def test_one_after_the_other_is_as_all_together(sizes: list[MatrixSize], workers: list[Seat], plan: Plan) -> None:
    """A model that is loaded matrix by matrix lies as the plan said beforehand."""
    together = placed_or_skipped(sizes, workers, plan)
    placed: list[Shard] = []
    of = {it.name: it for it in sizes}
    for matrix in sizes:
        placed += place_next(matrix, placed, of, workers, plan)
    assert placed == together
