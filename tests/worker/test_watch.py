"""A watched slot: products are right, nothing outside of them is written, and a broken request ends the watch."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.wire.errors import MalformedMessage
from obfuscatune.wire.messages import ErrorCode
from obfuscatune.wire.shared_memory import SharedMemory
from obfuscatune.wire.slot import SLOT_BYTES, Word
from obfuscatune.worker import kernels
from obfuscatune.worker.compute import Computer
from obfuscatune.worker.declined import Declined
from tests.worker.serving import SECONDS

if not kernels.are_there():
    pytest.skip("no kernels can be compiled here; nobody watches", allow_module_level=True)

from obfuscatune.enclave.kernels.slot import compiled
from obfuscatune.enclave.link.slot import State
from obfuscatune.worker import watch as module
from obfuscatune.worker.kernels import few_rows
from obfuscatune.worker.watch import watch

SIZE = 1 << 16
ROWS_AT, PRODUCT_AT = 1 << 13, 1 << 15
WIDE = few_rows.strip_columns(4)  # as many columns as a matrix must have
INNER, COLUMNS = 16, 80
UNTOUCHED = 0.5


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def shared(size: int = SIZE) -> tuple[SharedMemory, torch.Tensor]:
    """Memory with a slot at its start, and the words of that; all else holds UNTOUCHED."""
    memory, descriptor = SharedMemory.create(size)
    os.close(descriptor)
    memory.matrix(0, 1, size // 4, torch.float32).fill_(UNTOUCHED)
    return memory, words_of(memory)


def words_of(memory: SharedMemory) -> torch.Tensor:
    return memory.matrix(0, 1, SLOT_BYTES, torch.uint8).zero_().view(torch.int64)[0]


def post(words: torch.Tensor, number: int, matrix: int, rows: int, source: int = ROWS_AT, to: int = PRODUCT_AT) -> bool:
    return compiled().post(words.data_ptr(), number, matrix, rows, source, to)


def bound(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Of the error of sums of p products in float32, in any order."""
    return x.shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ W.double().abs())


def assert_right(found: torch.Tensor, x: torch.Tensor, W: torch.Tensor) -> None:
    assert ((found.double() - x.double() @ W.double()).abs() <= bound(x, W)).all()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches end because of what a test does, not because a busy machine let it wait."""
    monkeypatch.setattr(module, "AWAKE_SECONDS", SECONDS)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 32), st.integers(1, 90), st.integers(WIDE, 400), st.integers(1, 3), st.booleans())
def test_what_is_posted_is_multiplied(m: int, p: int, q: int, threads: int, shares: bool) -> None:
    """By the matrix that is named, on one thread or several; and nothing but the product and the slot is written."""
    x, matrices = some(m, p), [some(p, q), some(p + 1, WIDE), some(p, q, seed=1)]
    memory, words = shared(1 << 17)
    memory.matrix(ROWS_AT, m, p, torch.float32).copy_(x)
    before = memory.rest(0).clone()
    post(words, 1, 2, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "BYTES_PER_THREAD", 1 if shares else 1 << 20)
        done = watch(memory, 0, matrices, threads)
    assert_right(memory.matrix(PRODUCT_AT, m, q, torch.float32), x, matrices[2])
    assert (done.products, done.operations, done.nbytes) == (1, 2 * m * p * q, 4 * (p * q + m * (p + q)))
    assert done.seconds > 0
    assert (words[Word.ANSWERED], words[Word.WATCHED]) == (1, 0)
    after = memory.rest(0).clone()
    for start, size in ((0, SLOT_BYTES), (PRODUCT_AT, 4 * m * q)):
        after[start : start + size] = before[start : start + size] = 0
    assert torch.equal(before, after)


def test_one_request_after_another(patient: None) -> None:
    """Of one watch: other rows, another number of them, another matrix, another place each time."""
    matrices = [some(INNER, COLUMNS), some(24, WIDE + 3)]
    memory, words = shared(1 << 20)
    done: list[Any] = []
    watching = threading.Thread(target=lambda: done.append(watch(memory, 0, matrices, 1)))
    watching.start()
    try:
        for number in range(1, 41):
            W = matrices[number % 2]
            x, places = some(1 + number % 32, W.shape[0], seed=number), (4096 * number, (1 << 19) + 64 * number)
            memory.matrix(places[0], *x.shape, torch.float32).copy_(x)
            post(words, number, number % 2, x.shape[0], *places)
            wait_for(words, Word.ANSWERED, number)
            assert_right(memory.matrix(places[1], x.shape[0], W.shape[1], torch.float32), x, W)
            assert words[Word.WATCHED] == 1
    finally:
        words[Word.LEAVE] = 1
        watching.join(SECONDS)
    assert done[0].products == 40
    assert words[Word.WATCHED] == 0


def wait_for(words: torch.Tensor, word: Word, value: int) -> None:
    until = time.monotonic() + SECONDS
    while words[word] != value:
        assert time.monotonic() < until, f"{word.name} did not become {value}"


BROKEN = {
    "a matrix that was not named": (2, 1, ROWS_AT, PRODUCT_AT),
    "a matrix before the first": (-1, 1, ROWS_AT, PRODUCT_AT),
    "a matrix by an overflow": (2**61, 1, ROWS_AT, PRODUCT_AT),
    "no rows": (1, 0, ROWS_AT, PRODUCT_AT),
    "a row too many": (1, 33, ROWS_AT, PRODUCT_AT),
    "2^63 rows": (1, 2**63, ROWS_AT, PRODUCT_AT),
    "2^63 + 1 rows": (1, 2**63 + 1, ROWS_AT, PRODUCT_AT),
    "minus one row": (1, -1, ROWS_AT, PRODUCT_AT),
    "rows that are not aligned": (1, 1, ROWS_AT + 4, PRODUCT_AT),
    "a product that is not aligned": (1, 1, ROWS_AT, PRODUCT_AT + 32),
    "rows at the end": (1, 1, SIZE, PRODUCT_AT),
    "rows that go beyond it": (1, 2, SIZE - 64, PRODUCT_AT),
    "rows behind it": (1, 1, SIZE + 64, PRODUCT_AT),
    "rows at 2^63": (1, 1, 2**63, PRODUCT_AT),
    "rows that wrap around": (1, 2, 2**64 - 64, PRODUCT_AT),
    "a product at the end": (1, 1, ROWS_AT, SIZE),
    "a product that does not fit": (1, 1, ROWS_AT, SIZE - 256),
    "many rows' product that does not fit": (1, 32, ROWS_AT, SIZE - 31 * 320),
    "a product at 2^63": (1, 1, ROWS_AT, 2**63),
    "a product that wraps around": (1, 1, ROWS_AT, 2**64 - 256),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_request_ends_the_watch_and_nothing_is_written(name: str) -> None:
    memory, words = shared()
    post(words, 1, *BROKEN[name])
    before = memory.rest(0).clone()
    with pytest.raises(MalformedMessage, match="no request for rows of a matrix"):
        watch(memory, 0, [some(INNER, WIDE), some(INNER, COLUMNS)], 1)
    assert torch.equal(memory.rest(0), before)


def test_a_broken_request_after_a_good_one(patient: None) -> None:
    memory, words = shared()
    failed: list[MalformedMessage] = []

    def run() -> None:
        try:
            watch(memory, 0, [some(INNER, COLUMNS)], 1)
        except MalformedMessage as error:
            failed.append(error)

    watching = threading.Thread(target=run)
    post(words, 1, 0, 1)
    watching.start()
    wait_for(words, Word.ANSWERED, 1)
    post(words, 2, 0, 0)
    watching.join(SECONDS)
    assert len(failed) == 1
    assert (words[Word.ANSWERED], words[Word.WATCHED]) == (1, 0)


def test_rows_and_product_may_lie_at_the_very_end() -> None:
    memory, words = shared()
    x, W = some(1, INNER), some(INNER, COLUMNS)
    memory.matrix(SIZE - 64, 1, INNER, torch.float32).copy_(x)
    post(words, 1, 0, 1, SIZE - 64, SIZE - 64 - 320)
    watch(memory, 0, [W], 1)
    assert_right(memory.matrix(SIZE - 64 - 320, 1, COLUMNS, torch.float32), x, W)
    post(words, 2, 0, 1, ROWS_AT, SIZE - 320)
    watch(memory, 0, [W], 1)
    assert_right(memory.matrix(SIZE - 320, 1, COLUMNS, torch.float32), torch.full((1, INNER), UNTOUCHED), W)


def test_a_watch_ends_when_nothing_comes() -> None:
    memory, words = shared()
    assert watch(memory, 0, [some(INNER, COLUMNS)], 1).products == 0
    assert words.eq(0).all()


def test_what_was_answered_is_not_answered_again() -> None:
    memory, words = shared()
    post(words, 7, 0, 1)
    assert watch(memory, 0, [some(INNER, COLUMNS)], 1).products == 1
    memory.matrix(PRODUCT_AT, 1, COLUMNS, torch.float32).fill_(UNTOUCHED)
    assert watch(memory, 0, [some(INNER, COLUMNS)], 1).products == 0
    assert memory.matrix(PRODUCT_AT, 1, COLUMNS, torch.float32).eq(UNTOUCHED).all()
    assert words[Word.ANSWERED] == 7


@pytest.mark.parametrize("posted", [0, 1])
def test_it_leaves_when_it_is_called(patient: None, posted: int) -> None:
    """After it has answered what was posted before."""
    memory, words = shared()
    words[Word.LEAVE] = 1
    if posted:
        post(words, 1, 0, 1)
    assert watch(memory, 0, [some(INNER, COLUMNS)], 1).products == posted
    assert (words[Word.ANSWERED], words[Word.WATCHED]) == (posted, 0)


def test_it_has_a_look_around_after_many_requests(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REQUESTS", 1)
    memory, words = shared()
    post(words, 1, 0, 1)
    assert watch(memory, 0, [some(INNER, COLUMNS)], 1).products == 1
    assert words[Word.WATCHED] == 0


def test_posting_says_whether_somebody_watches() -> None:
    words = torch.zeros(SLOT_BYTES // 8, dtype=torch.int64)
    for watched in (0, 1):
        words[Word.WATCHED] = watched
        assert post(words, 1, 5, 4, 128, 64) is bool(watched)
    assert words[:6].tolist() == [1, 5, 4, 128, 64, 0]


@pytest.mark.parametrize(
    ("watched", "answered", "state"),
    [(1, 2, State.ANSWERED), (0, 2, State.ANSWERED), (0, 1, State.UNWATCHED), (1, 1, State.PENDING)],
)
def test_what_a_wait_finds(watched: int, answered: int, state: State) -> None:
    words = torch.zeros(SLOT_BYTES // 8, dtype=torch.int64)
    words[Word.WATCHED], words[Word.ANSWERED] = watched, answered
    assert compiled().wait(words.data_ptr(), 2, 100) is state


@pytest.mark.parametrize(
    "matrix",
    [some(INNER, COLUMNS).double(), some(INNER, COLUMNS).bfloat16(), some(COLUMNS, INNER).T, some(INNER, WIDE - 1)],
    ids=["float64", "bfloat16", "not contiguous", "narrow"],
)
def test_matrices_that_are_none_for_a_slot(matrix: torch.Tensor) -> None:
    memory, words = shared()
    with pytest.raises(Declined) as caught:
        watch(memory, 0, [some(INNER, COLUMNS), matrix], 1)
    assert caught.value.code is ErrorCode.SHAPE
    assert words.eq(0).all()


@pytest.mark.parametrize("offset", [SIZE, SIZE - 64, 32, 2**63, 2**64 - 64])
def test_a_slot_that_does_not_lie_in_the_memory(offset: int) -> None:
    with pytest.raises(MalformedMessage):
        watch(shared()[0], offset, [some(INNER, COLUMNS)], 1)


@pytest.mark.parametrize(
    "computer",
    [Computer(torch.device("cpu"), torch.bfloat16), Computer(torch.device("cpu"), may_watch=False)],
    ids=["another dtype", "switched off"],
)
def test_who_does_not_watch_declines(computer: Computer) -> None:
    assert not computer.watches
    with pytest.raises(Declined, match="send messages"):
        computer.watch(shared()[0], 0, [some(INNER, COLUMNS)])
