"""A worker that watches a slot, and does whatever it likes: products are right, or one error says so."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from obfuscatune.enclave.link import RetryPolicy, WorkerLink
from obfuscatune.enclave.link import driver as module_of_driver
from obfuscatune.enclave.link import slot as module
from obfuscatune.wire.errors import (
    BadMagic,
    BadReply,
    ConnectionLost,
    DeadlineExceeded,
    MalformedMessage,
    ProtocolError,
    UnknownMatrix,
    WireError,
)
from obfuscatune.wire.messages import ErrorCode, Header, MessageType
from obfuscatune.wire.slot import Word
from obfuscatune.worker.answer import Request
from tests.enclave.link.slots import ID, OTHER, V, W, assert_right, lent, some, stored, why_none
from tests.enclave.link.test_worker_link import QUICK
from tests.enclave.link.watchers import Watching, WatchingTransport, WatchingWorker

if reason := why_none():
    pytest.skip(reason, allow_module_level=True)

MULTIPLY, WATCH = MessageType.MULTIPLY, MessageType.WATCH


def in_memory(worker: WatchingWorker, retry: RetryPolicy = QUICK) -> WorkerLink:
    return stored(WorkerLink(worker, deadline_s=0.05, retry=retry))


def test_what_is_asked_lies_in_the_slot_when_a_watch_begins() -> None:
    """Not what the watch before did not see: the worker would take that for it, and answer into what is lent anew."""
    worker = WatchingWorker(say(MessageType.DONE), times=2)
    x = some(4, 96)
    with in_memory(worker) as link:
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert worker.posted == [1, 2, 3]
        assert (link.stats.reconnects, link.stats.retries, link.stats.crossings) == (0, 0, 1)


def test_a_worker_that_leaves_again_and_again_has_no_longer_than_any_other() -> None:
    """It says DONE to WATCH, and does not multiply: however often, all of that is one sending with one deadline."""
    deadlines: list[object] = []

    def leave(transport: WatchingTransport, request: Request) -> bytes | None:
        deadlines.append(link._driver._posted and link._driver._posted.deadline)
        return say(MessageType.DONE)(transport, request)

    link, x = in_memory(WatchingWorker(leave, times=3)), some(4, 96)
    assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    assert len(deadlines) == 3
    assert all(deadline is deadlines[0] for deadline in deadlines)


def test_a_request_for_a_matrix_that_was_forgotten_meanwhile() -> None:
    """One that a watch did not see, and that is asked again."""
    link = in_memory(WatchingWorker(say(MessageType.DONE), times=1))
    stored(link, OTHER, V)
    pending = link.submit(ID, lent(link, some(4, 96)), transpose=False)
    link.forget(ID)
    with pytest.raises(UnknownMatrix):
        pending.result()
    assert_right(link.multiply(OTHER, lent(link, some(4, 96)), transpose=False), some(4, 96), V)


def refuse(code: ErrorCode, request_id: int | None = None) -> Watching:
    def watching(transport: WatchingTransport, request: Request) -> bytes:
        answered = request.header.request_id if request_id is None else request_id
        return Header(MessageType.ERROR, answered, payload_bytes=2, code=code).pack() + b"no"

    return watching


def say(kind: MessageType, request_id: int | None = None, **fields: object) -> Watching:
    def watching(transport: WatchingTransport, request: Request) -> bytes:
        answered = request.header.request_id if request_id is None else request_id
        return Header(kind, answered, **fields).pack()  # type: ignore[arg-type]

    return watching


def answer_with(value: float) -> Watching:
    """The product is all that value."""

    def watching(transport: WatchingTransport, request: Request) -> None:
        words = transport.words
        rows, place = int(words[Word.ROWS]), int(words[Word.TO])
        transport.memory.matrix(place, rows, W.shape[1], torch.float32).fill_(value)
        words[Word.WATCHED] = 1
        words[Word.ANSWERED] = words[Word.POSTED]

    return watching


def watch_for_ever(transport: WatchingTransport, request: Request) -> None:
    transport.words[Word.WATCHED] = 1


def write(word: Word, value: int) -> Watching:
    """Something else into the slot, and no answer."""

    def watching(transport: WatchingTransport, request: Request) -> None:
        transport.words[word] = value

    return watching


def hang_up(transport: WatchingTransport, request: Request) -> bytes:
    transport.ended = True
    return b""


HOSTILE: dict[str, tuple[Watching, type[WireError]]] = {
    "watches and never answers": (watch_for_ever, DeadlineExceeded),
    "never watches": (lambda transport, request: None, DeadlineExceeded),
    "answers another request": (write(Word.ANSWERED, 99), DeadlineExceeded),
    "writes garbage": (write(Word.WATCHED, -1), DeadlineExceeded),
    "hangs up": (hang_up, ConnectionLost),
    "says garbage": (lambda transport, request: b"HTTP" * 40, BadMagic),
    "says STORED": (say(MessageType.STORED), MalformedMessage),
    "says DONE to another request": (say(MessageType.DONE, 999), MalformedMessage),
    "says a request": (say(MessageType.FORGET), MalformedMessage),
    "an error that answers another request": (refuse(ErrorCode.FAILED, 999), MalformedMessage),
    "an error that answers nothing": (refuse(ErrorCode.MALFORMED, 0), ProtocolError),
    "NaN": (answer_with(float("nan")), BadReply),
    "infinity": (answer_with(float("-inf")), BadReply),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_product_is_right_all_the_same(name: str) -> None:
    """However often it does that: rows that lie in the memory of a lost connection are sent."""
    worker, x = WatchingWorker(HOSTILE[name][0]), some(4, 96)
    with in_memory(worker) as link:
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert (link.stats.reconnects, link.stats.retries, link.stats.crossings) == (1, 1, 1)
        assert [header.type for header in worker.seen].count(WATCH) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_where_nothing_is_tried_again_one_typed_error_says_so(name: str) -> None:
    watching, error = HOSTILE[name]
    worker = WatchingWorker(watching)
    link = in_memory(worker, RetryPolicy(attempts=1, patience_s=0, backoff_s=0))
    started = time.monotonic()
    with pytest.raises(error) as caught:
        link.multiply(ID, lent(link, some(4, 96)), transpose=False)
    assert time.monotonic() - started < 5  # the deadline is a hundredth of that
    assert "\n" not in str(caught.value)
    assert all(connection.closed for connection in worker.connections)
    worker.watching = None
    assert_right(link.multiply(ID, lent(link, some(4, 96)), transpose=False), some(4, 96))


def test_a_product_may_be_left_unchecked() -> None:
    """Where the caller looks for NaN itself, once it lies in memory of its own."""
    link = in_memory(WatchingWorker(answer_with(float("nan"))))
    pending = link.submit(ID, lent(link, some(4, 96)), transpose=False, product_unchecked=True)
    assert pending.result().isnan().all()


CODES = (ErrorCode.FAILED, ErrorCode.SHAPE, ErrorCode.UNKNOWN_MATRIX, ErrorCode.BUSY)


@pytest.mark.parametrize("code", CODES)
def test_one_that_will_not_watch_is_sent_messages_for_a_while(code: ErrorCode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is asked again."""
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    worker = WatchingWorker(refuse(code), times=1)
    link, x = in_memory(worker), some(4, 96)
    rest = module.REST_SECONDS
    for now, types in ((1.0, [WATCH, MULTIPLY]), (1 + 0.9 * rest, [MULTIPLY]), (1 + 1.1 * rest, [WATCH])):  # noqa: B007
        worker.seen.clear()
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
        assert [header.type for header in worker.seen] == types
        assert link.is_watched is (MULTIPLY not in types)
    assert (link.stats.retries, link.stats.reconnects, link.stats.crossings) == (0, 0, 3)


@pytest.mark.parametrize("name", ["DONE", "silence"])
def test_a_worker_whose_watches_answer_nothing_is_sent_messages(name: str) -> None:
    """Not a deadline at every request: after a few, it is not asked to watch any more."""
    watching = {"DONE": say(MessageType.DONE), "silence": watch_for_ever}[name]
    worker, x = WatchingWorker(watching), some(4, 96)
    link = in_memory(worker)
    for _ in range(6):
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    watches = [header.type for header in worker.seen].count(WATCH)
    assert watches <= module_of_driver.MOST_WATCHES_FAILED
    assert link.stats.reconnects <= 2
    for _ in range(3):
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    assert [header.type for header in worker.seen].count(WATCH) == watches


def test_an_answer_in_between_makes_good_for_what_failed() -> None:
    worker, x = WatchingWorker(say(MessageType.DONE), times=0), some(4, 96)
    link = stored(WorkerLink(worker, deadline_s=30, retry=QUICK))
    for _ in range(3):
        worker.watches = module_of_driver.MOST_WATCHES_FAILED - 2  # the end of the last watch that answered is one
        assert_right(link.multiply(ID, lent(link, x), transpose=False), x)
    assert [header.type for header in worker.seen].count(MULTIPLY) == 0
