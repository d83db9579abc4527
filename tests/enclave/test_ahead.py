"""One step ahead, and no further."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from obfuscatune.enclave.ahead import one_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    assert list(one_ahead(partial(int, index) for index in range(count))) == list(range(count))


def test_the_next_is_made_while_one_is_used_and_no_other() -> None:
    """In step: each waits for the user to hold the result before it, which only a step made beside it can do."""
    begun: list[int] = []
    used = [threading.Event() for _ in range(4)]

    def make(index: int) -> int:
        begun.append(index)
        if index > 0:
            assert used[index - 1].wait(30), "made before the result before it was handed out"
        return index

    for index in one_ahead(partial(make, index) for index in range(4)):
        used[index].set()
        assert max(begun) <= index + 1


def test_what_a_step_raises_is_raised_in_its_turn() -> None:
    def fail() -> int:
        raise ValueError("the second")

    steps: list[Callable[[], int]] = [lambda: 1, fail, lambda: 3]
    results = one_ahead(steps)
    assert next(results) == 1
    with pytest.raises(ValueError, match="the second"):
        next(results)


def test_who_leaves_early_waits_for_the_step_that_runs() -> None:
    finished = threading.Event()
    release = threading.Event()

    def slow() -> int:
        release.wait(30)
        finished.set()
        return 2

    with closing(one_ahead([lambda: 1, slow, lambda: 3])) as results:
        assert next(results) == 1
        release.set()
    assert finished.is_set()
