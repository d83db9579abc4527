"""Each edge of the driver's state machine, one step at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy
from obfuscatune.enclave.client.requests import ProductRequest, StoredMatrix
from obfuscatune.enclave.client.scheduler import Scheduler, State
from obfuscatune.errors import DeadlineExceeded
from obfuscatune.protocol.limits import MAX_IN_FLIGHT
from tests.enclave.client.peers import MemoryTransport, MemoryWorker

ID, OTHER = bytes(range(1, 17)), bytes(range(2, 18))
W = torch.eye(3)


class Sharing(MemoryTransport):
    """Idle connections can be looked at."""

    news = False

    def has_news(self, seconds: float = 0.0) -> bool:
        return self.news


class Worker(MemoryWorker):
    def __call__(self) -> MemoryTransport:
        self.connections.append(Sharing(self))
        return self.connections[-1]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def driver(worker: Worker) -> Scheduler:
    """One that is connected, to a worker that holds a matrix."""
    driver = Scheduler(worker, 10.0, RetryPolicy(attempts=2, backoff_s=0))
    matrix = StoredMatrix(ID, lambda: W, (3, 3), W.dtype)
    driver.matrices[ID] = driver.missing[ID] = matrix
    driver.step()
    driver.step()
    return driver


def asked(driver: Scheduler, matrix_id: bytes = ID) -> ProductRequest:
    pending = ProductRequest(driver.matrices[matrix_id], torch.ones(1, 3), False, W.dtype, lambda _: None)
    driver.waiting.append(pending)
    return pending


def walked(driver: Scheduler, *states: State) -> State:
    """Take these steps; the state afterwards."""
    for state in states:
        assert driver.state is state
        driver.step()
    return driver.state


def test_connect_then_upload_then_send() -> None:
    driver = Scheduler(MemoryWorker(), 10.0, RetryPolicy())
    driver.matrices[ID] = driver.missing[ID] = StoredMatrix(ID, lambda: W, (3, 3), W.dtype)
    pending = asked(driver)
    walked(driver, State.CONNECT, State.UPLOAD, State.SEND, State.RECEIVE)
    assert pending.product is not None
    assert driver.stats.uploads == driver.stats.crossings == 1


def test_requests_are_sent_while_there_is_room_and_received_then(driver: Scheduler) -> None:
    pendings = [asked(driver) for _ in range(MAX_IN_FLIGHT + 1)]
    walked(driver, *[State.SEND] * MAX_IN_FLIGHT, State.RECEIVE, State.SEND, *[State.RECEIVE] * MAX_IN_FLIGHT)
    assert all(pending.done for pending in pendings)


def test_an_upload_waits_for_what_is_in_flight_and_what_waits_for_the_upload(driver: Scheduler) -> None:
    first = asked(driver)
    walked(driver, State.SEND)
    driver.matrices[OTHER] = driver.missing[OTHER] = StoredMatrix(OTHER, lambda: 2 * W, (3, 3), W.dtype)
    second = asked(driver, OTHER)
    walked(driver, State.RECEIVE, State.UPLOAD, State.SEND, State.RECEIVE)
    assert first.done
    assert second.product is not None
    assert torch.equal(second.product, torch.full((1, 3), 2.0))


def test_forget_comes_after_what_is_in_flight_and_before_what_waits(driver: Scheduler) -> None:
    asked(driver)
    walked(driver, State.SEND)
    driver.leaving[OTHER] = None
    asked(driver)
    assert walked(driver, State.RECEIVE, State.FORGET) is State.SEND
    assert not driver.leaving


def test_a_matrix_that_the_worker_lacks_is_uploaded_and_asked_for_again(driver: Scheduler, worker: Worker) -> None:
    worker.store.forget_session(worker.connections[0]._session)
    pending = asked(driver)
    walked(driver, State.SEND, State.RECEIVE, State.UPLOAD, State.SEND, State.RECEIVE)
    assert pending.product is not None
    assert driver.stats.retries == 1


@pytest.mark.parametrize("dead", [False, True])
def test_what_was_idle_is_looked_at_first(driver: Scheduler, worker: Worker, dead: bool) -> None:
    pending = asked(driver)
    assert driver._connection is not None
    driver._connection._heard_at -= 3600
    worker.connections[0].news = dead  # type: ignore[attr-defined]
    walked(driver, State.CHECK, *([State.CONNECT] if dead else []), State.SEND, State.RECEIVE)
    assert pending.done
    assert driver.stats.reconnects == dead


def _silence(worker: Worker) -> None:
    worker.connections[0]._mute = True


def _hang_up(worker: Worker) -> None:
    worker.connections[0].close()


@pytest.mark.parametrize(("fail", "again"), [(_silence, 1), (_hang_up, 2)])
def test_after_a_failure_all_begins_anew(
    driver: Scheduler, worker: Worker, fail: Callable[[Worker], None], again: int
) -> None:
    """What was sent and not answered goes out again, under a new id: the second request, or both."""
    first = asked(driver)
    walked(driver, State.SEND)
    second = asked(driver)
    fail(worker)
    driver.drive(lambda: first.done and second.done)
    assert first.product is not None
    assert second.product is not None
    assert driver.stats.reconnects == 1
    assert driver.stats.retries == again
    ids = [header.request_id for header in worker.seen]
    assert len(set(ids) - {0}) == len([number for number in ids if number])


def test_a_failure_too_many_fails_all_that_waits(driver: Scheduler, worker: Worker) -> None:
    worker.mischief = lambda _: None
    pendings = [asked(driver), asked(driver)]
    with pytest.raises(DeadlineExceeded, match="gave up after 2 attempts"):
        driver.drive(lambda: pendings[0].done)
    assert driver.state is State.CONNECT
    assert all(pending.error is not None for pending in pendings)
