"""Several at a time, each in a place of its own; results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from obfuscatune.enclave.threads import map_in_threads


@pytest.mark.parametrize("places", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order(count: int, places: int) -> None:
    with map_in_threads(lambda item, place, in_turn: item, range(count), range(places)) as results:
        assert list(results) == list(range(count))


def test_there_are_as_many_at_a_time_as_places_and_no_two_have_one() -> None:
    both = threading.Barrier(2, timeout=30)
    taken: set[str] = set()

    def work(item: int, place: str, in_turn: Callable[[], None]) -> int:
        assert place not in taken
        taken.add(place)
        both.wait()  # only another that is under way can let this one go on
        taken.remove(place)
        return item

    with map_in_threads(work, range(6), ["here", "there"]) as results:
        assert list(results) == list(range(6))


def test_they_share_the_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with map_in_threads(lambda item, place, in_turn: torch.get_num_threads(), range(4), range(2)) as results:
            assert list(results) == [1] * 4
        found: list[int] = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (found, torch.get_num_threads()) == ([2], 2)
    finally:
        torch.set_num_threads(threads)


def test_what_one_raises_is_raised_in_its_turn() -> None:
    def work(item: int, place: int, in_turn: Callable[[], None]) -> int:
        if item == 1:
            raise ValueError("the second")
        return item

    with pytest.raises(ValueError, match="the second"), map_in_threads(work, range(3), range(2)) as results:
        assert next(results) == 0
        next(results)


class Left(Exception):
    """By whoever uses the results."""


@pytest.mark.parametrize(("reason", "breaks_off"), [(Left, False), (KeyboardInterrupt, True)])
def test_who_leaves_early_waits_for_what_runs(reason: type[BaseException], breaks_off: bool) -> None:
    begun, release = [threading.Event() for _ in range(5)], threading.Event()
    finished: list[int] = []
    broken_off: list[str] = []

    def work(item: int, place: int, in_turn: Callable[[], None]) -> int:
        begun[item].set()
        if item:
            release.wait(30)
        finished.append(item)
        return item

    @contextmanager
    def break_off() -> Iterator[None]:
        broken_off.append("begun")
        release.set()
        yield
        broken_off.append("ended")
        assert sorted(finished) == [0, 1, 2]

    with pytest.raises(reason), map_in_threads(work, range(5), range(2), break_off) as results:
        next(results)
        begun[1].wait(30), begun[2].wait(30)
        if not breaks_off:
            release.set()
        raise reason
    assert broken_off == (["begun", "ended"] if breaks_off else [])
    assert set(finished) >= {0, 1, 2}


def test_what_is_done_in_turn_is_done_in_order() -> None:
    """Also where one of them fails before it is its turn: those after it are not held up."""
    second_waits = threading.Event()
    done: list[int] = []

    def work(item: int, place: int, in_turn: Callable[[], None]) -> int:
        if item == 0:
            assert second_waits.wait(30)
        if item == 1:
            second_waits.set()
        if item == 2:
            raise ValueError
        in_turn()
        done.append(item)
        return item

    with map_in_threads(work, range(5), range(2)) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError):
            next(results)
    assert done[:2] == [0, 1]
    assert done == sorted(done)
