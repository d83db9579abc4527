"""Few rows go through a slot that the worker watches; whatever it does, products are right or one error says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.link import RetryPolicy, WorkerLink
from obfuscatune.enclave.link import slot as module
from obfuscatune.enclave.link.connection import LinkConnection
from obfuscatune.enclave.local import LocalWorker, local_worker
from obfuscatune.wire.errors import ConfigError
from obfuscatune.wire.messages import Header, MessageType
from tests.enclave.link.slots import ID, OTHER, THIRD, V, W, assert_right, lent, some, stored, why_none
from tests.worker.serving import serving

if reason := why_none():
    pytest.skip(reason, allow_module_level=True)

MULTIPLY, WATCH = MessageType.MULTIPLY, MessageType.WATCH


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[MessageType]:
    """Types of all messages that the enclave sends from now on."""
    types: list[MessageType] = []
    send = LinkConnection.send

    def spied(self: LinkConnection, header: Header, *rest: object, **named: object) -> None:
        types.append(header.type)
        send(self, header, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(LinkConnection, "send", spied)
    return types


@pytest.fixture
def link(worker: LocalWorker) -> Iterator[WorkerLink]:
    """To a worker process; W is stored under ID."""
    with WorkerLink.open(worker.address) as opened:
        yield stored(opened)


@pytest.mark.parametrize("rows", [1, 2, 9, 32])
def test_few_rows_go_through_the_slot(link: WorkerLink, sent: list[MessageType], rows: int) -> None:
    assert not link.is_watched
    x = some(rows, 96)
    before = link.stats.snapshot()
    found = link.multiply(ID, lent(link, x), transpose=False)
    assert_right(found, x)
    assert link.is_watched
    assert set(sent) == {WATCH}
    spent = link.stats.since(before)
    assert (spent.crossings, spent.retries, spent.reconnects) == (1, 0, 0)
    assert spent.bytes_received >= found.nbytes == 4 * rows * 130
    by_message = link.multiply(ID, x, transpose=False)
    assert sent[-1] is MULTIPLY
    assert_right(by_message, x)
    if rows > 1:  # of one row, messages leave the product to BLAS
        assert torch.equal(found, by_message)


def test_one_watch_serves_many_requests(
    tmp_path: Path, sent: list[MessageType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the worker is called away for a message; afterwards a second one does."""
    monkeypatch.setattr("obfuscatune.worker.watch.AWAKE_SECONDS", 20.0)  # not before, on a busy machine either
    with serving(tmp_path) as running, WorkerLink.open(str(running.address), deadline_s=10) as link:
        stored(link)
        sent.clear()
        for number in range(1, 101):
            x = some(1 + number % 32 if number % 50 else 40, 96, seed=number)
            assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert sent == [WATCH, MULTIPLY, WATCH, MULTIPLY]
        assert (link.stats.crossings, link.stats.retries, link.stats.reconnects) == (100, 0, 0)


def test_a_worker_that_was_let_go_is_asked_anew(link: WorkerLink, sent: list[MessageType]) -> None:
    x = some(3, 96)
    link.let_go()  # nothing was posted yet
    for _ in range(3):
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        link.let_go()
    assert set(sent) == {WATCH}
    assert len(sent) >= 3  # more where this process was set aside for longer than a worker watches
    assert link.stats.retries == 0


def test_the_rest_goes_by_message(link: WorkerLink, sent: list[MessageType]) -> None:
    x = some(33, 96)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    g = some(3, 130)
    assert_right(link.multiply(ID, lent(link, g), transpose=True), g, W.T)
    x = some(3, 96)
    assert_right(link.multiply(ID, x, transpose=False), x)
    wide = link.multiply(ID, lent(link, x), transpose=False, reply_dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert_right(wide, x)
    stored(link, OTHER, W.double())
    rows = lent(link, x.double())
    torch.testing.assert_close(link.multiply(OTHER, rows, transpose=False), rows @ W.double(), rtol=0, atol=1e-12)
    assert WATCH not in sent
    assert sent.count(MULTIPLY) == 5
    assert not link.is_watched


def test_a_matrix_that_is_none_for_a_slot_costs_nothing_but_speed(link: WorkerLink) -> None:
    stored(link, OTHER, W.double())
    stored(link, THIRD, some(96, 3))
    x = some(3, 96)
    for _ in range(3):
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert_right(link.multiply(THIRD, lent(link, x), transpose=False), x, some(96, 3))


def test_a_matrix_that_is_stored_while_the_worker_watches(link: WorkerLink, sent: list[MessageType]) -> None:
    x = some(4, 96)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    stored(link, OTHER, V)
    for matrix_id, matrix in ((OTHER, V), (ID, W), (OTHER, V)):
        assert_right(link.multiply(matrix_id, lent(link, x), transpose=False), x, matrix)
    assert MULTIPLY not in sent


def test_a_matrix_that_is_replaced_while_the_worker_watches(link: WorkerLink, sent: list[MessageType]) -> None:
    x = some(4, 96)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    stored(link, ID, V)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x, V)
    assert MULTIPLY not in sent


def test_a_matrix_that_is_forgotten_while_the_worker_watches(link: WorkerLink) -> None:
    stored(link, OTHER, V)
    x = some(4, 96)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    link.forget(ID)
    with pytest.raises(ConfigError):
        link.multiply(ID, lent(link, x), transpose=False)
    assert_right(link.multiply(OTHER, lent(link, x), transpose=False), x, V)


def test_more_matrices_than_a_watch_may_name(
    link: WorkerLink, sent: list[MessageType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WATCHED", 1)
    stored(link, OTHER, V)
    x = some(4, 96)
    for matrix_id, matrix in ((ID, W), (OTHER, V), (ID, W), (ID, W)):
        assert_right(link.multiply(matrix_id, lent(link, x), transpose=False), x, matrix)
    assert MULTIPLY not in sent


def test_few_and_many_rows_in_turn(link: WorkerLink, sent: list[MessageType]) -> None:
    """Several in flight, either way, and answers taken in another order than they were asked for in."""
    stored(link, OTHER, V)
    for turn in range(5):
        asked = [(some(rows, 96, seed=turn), *pair) for rows in (3, 40, 1, 32, 33) for pair in ((ID, W), (OTHER, V))]
        pendings = [link.submit(matrix_id, lent(link, x), transpose=False) for x, matrix_id, _ in asked]
        for pending, (x, _, matrix) in list(zip(pendings, asked, strict=True))[:: (-1) ** turn]:
            assert_right(pending.result(), x, matrix)
        g = some(3, 130)
        assert_right(link.multiply(ID, lent(link, g), transpose=True), g, W.T)
    assert {WATCH, MULTIPLY} <= set(sent)
    assert (link.stats.retries, link.stats.reconnects) == (0, 0)


def test_from_several_threads(link: WorkerLink) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                x = some(1 + (seed * turn) % 36, 96, seed=seed)
                assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_worker_that_is_killed_while_a_request_is_posted(sent: list[MessageType]) -> None:
    retry = RetryPolicy(longest_backoff_s=0.1)  # only to be quicker: the worker is back after seconds
    with local_worker(threads=1) as worker, WorkerLink.open(worker.address, retry=retry) as link:
        x = some(4, 96)
        assert_right(stored(link).multiply(ID, lent(link, x), transpose=False), x)
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)  # until all its threads stand still
        pending = link.submit(ID, lent(link, x), transpose=False)
        worker.restart()
        assert_right(pending.result(), x)
        assert (link.stats.reconnects, link.stats.crossings) == (1, 2)
        assert link.stats.retries >= 1
        assert link.stats.uploads == 2
        sent.clear()
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert WATCH in sent and not set(sent) - {
            WATCH,
            MessageType.FORGET,
        }  # a worker long idle is asked whether it is there


def test_a_worker_that_watches_no_slots(sent: list[MessageType]) -> None:
    with local_worker(threads=1, extra=("--no-watch",)) as worker, WorkerLink.open(worker.address) as link:
        x = some(4, 96)
        assert_right(stored(link).multiply(ID, lent(link, x), transpose=False), x)
        assert not link.is_watched
        assert WATCH not in sent


def test_asked_first_in_inference_mode(link: WorkerLink) -> None:
    x = some(4, 96)
    with torch.inference_mode():
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    stored(link, OTHER, V)  # the worker is called away from the slot
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
