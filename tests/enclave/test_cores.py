"""torch computes on a core less exactly while a model is called with few tokens beside a worker that watches."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obfuscatune.enclave.cores import CoreKeeper
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.wire.errors import ProtectionError
from obfuscatune.wire.limits import MAX_SLOT_ROWS

THREADS, FEWER = 4, 2  # of torch, and what is left of three cores beside the worker's
PRIVATE = resolve("private")
MOST = MAX_SLOT_ROWS - PRIVATE.shield_rows


class Link:
    """What a keeper asks of a link."""

    def __init__(self) -> None:
        self.is_watched = True
        self.let_go_times = 0

    def let_go(self) -> None:
        self.let_go_times += 1


class Body(nn.Module):
    """The blocks of a model: `inside` is called within its forward pass, which notes how many threads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.inside: Callable[[], object] | None = None

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: object) -> Tensor:
        self.seen.append(torch.get_num_threads())
        inside, self.inside = self.inside, None
        if inside is not None:
            inside()
            self.seen.append(torch.get_num_threads())
        return torch.zeros(1)


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("obfuscatune.enclave.cores.cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def link() -> Link:
    return Link()


def watched_over(link: Link, profile: Profile = PRIVATE) -> Body:
    body = Body()
    CoreKeeper(link, profile).watch_over(body)  # type: ignore[arg-type]
    return body


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool]] = {
    "a token": ((ids(1, 1),), {}, True),
    "as many as go through a slot": ((ids(2, MOST // 2),), {}, True),
    "one more": ((ids(1, MOST + 1),), {}, False),
    "by name": ((), {"input_ids": ids(1, 3)}, True),
    "many by name": ((), {"input_ids": ids(2, MOST)}, False),
    "embeddings": ((), {"inputs_embeds": torch.zeros(1, 3, 100)}, True),
    "many embeddings": ((), {"inputs_embeds": torch.zeros(5, MOST, 2)}, False),
    "no ids but embeddings": ((None,), {"inputs_embeds": torch.zeros(1, 3, 100)}, True),
    "nothing": ((), {}, False),
    "no tokens": ((ids(1, 0),), {}, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_core_is_left_during_calls_of_few_tokens(link: Link, name: str) -> None:
    args, kwargs, few = CALLS[name]
    body = watched_over(link)
    body(*args, **kwargs)
    assert body.seen == [FEWER if few else THREADS]
    assert torch.get_num_threads() == THREADS


def test_not_while_nobody_watches(link: Link) -> None:
    body = watched_over(link)
    for watched in (False, True, False):
        link.is_watched = watched
        body(ids(1, 1))
    assert body.seen == [THREADS, FEWER, THREADS]


def test_the_worker_is_let_go_when_the_blocks_are_done(link: Link) -> None:
    body = watched_over(link)
    body.inside = lambda: setattr(body, "times_inside", link.let_go_times)
    body(ids(1, 1))
    assert (body.times_inside, link.let_go_times) == (0, 1)
    body(ids(1, MOST + 1))
    assert link.let_go_times == 1  # it was not called upon


def test_what_a_watch_comes_to_in_between_changes_nothing(link: Link) -> None:
    """What was lowered is restored when nobody watches any more, and the other way round nothing is."""
    body = watched_over(link)
    body.inside = lambda: setattr(link, "is_watched", False)
    body(ids(1, 1))
    assert torch.get_num_threads() == THREADS
    body.inside = lambda: setattr(link, "is_watched", True)
    body(ids(1, 1))
    assert (body.seen, torch.get_num_threads()) == ([FEWER, FEWER, THREADS, THREADS], THREADS)


@pytest.mark.parametrize(
    "profile",
    [resolve("guarded"), resolve("paper"), resolve("private", shield_rows=MAX_SLOT_ROWS)],
    ids=["full rank", "no mixing", "many shield rows"],
)
def test_not_where_a_profile_sends_too_many_rows(link: Link, profile: Profile) -> None:
    body = watched_over(link, profile)
    body(ids(1, 1))
    assert body.seen == [THREADS]


@pytest.mark.parametrize(("cores", "threads", "fewer"), [(1, 4, 1), (2, 4, 1), (2, 1, 1), (8, 4, 4), (5, 5, 4)])
def test_how_many_threads_are_left(
    link: Link, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, fewer: int
) -> None:
    """One core less than there are, no more than before, and always one."""
    monkeypatch.setattr("obfuscatune.enclave.cores.cores", lambda: cores)
    torch.set_num_threads(threads)
    body = watched_over(link)
    body(ids(1, 1))
    assert (body.seen, torch.get_num_threads()) == ([fewer], threads)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_after_an_error_all_is_as_before(link: Link, error: type[Exception]) -> None:
    def fail() -> None:
        raise error("inside")

    body = watched_over(link)
    for _ in range(2):
        body.inside = fail
        with pytest.raises(error, match="inside"):
            body(ids(1, 1))
        assert torch.get_num_threads() == THREADS
    body(ids(1, 1))
    assert body.seen == [FEWER] * 3


def test_after_an_interrupt_all_is_as_before(link: Link) -> None:
    """Ctrl-C in the middle of `generate`, in a notebook that goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    body = watched_over(link)
    body.inside = interrupt
    with pytest.raises(KeyboardInterrupt):
        body(ids(1, 1))
    assert torch.get_num_threads() == THREADS
    body(ids(1, 1))
    assert (body.seen, torch.get_num_threads()) == ([FEWER, FEWER], THREADS)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 2 * MOST), (2 * MOST, 1)])
def test_calls_within_calls(link: Link, outer: int, inner: int) -> None:
    """The inner one restores what the outer one had."""
    body = watched_over(link)
    body.inside = lambda: body(ids(1, inner))
    body(ids(1, outer))
    before = FEWER if outer == 1 else THREADS
    assert body.seen == [before, FEWER if inner == 1 else before, before]
    assert torch.get_num_threads() == THREADS


def test_a_call_within_a_call_that_fails(link: Link) -> None:
    body = watched_over(link)

    def inner() -> None:
        body.inside = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            body(ids(1, 1))

    body.inside = inner
    body(ids(1, 1))
    assert (body.seen, torch.get_num_threads()) == ([FEWER] * 3, THREADS)


def test_each_thread_keeps_its_own(link: Link) -> None:
    """A call in another thread, which begins in the middle of one and ends after it."""
    body, began, over = watched_over(link), threading.Event(), threading.Event()
    left: list[int] = []

    def call() -> None:
        torch.set_num_threads(THREADS)
        body.inside = lambda: (began.set(), over.wait(20))
        body(ids(1, 1))
        left.append(torch.get_num_threads())

    other = threading.Thread(target=call)
    body.inside = lambda: (other.start(), began.wait(20))
    body(ids(1, 1))
    over.set()
    other.join(20)
    assert left == [THREADS]
    assert torch.get_num_threads() == THREADS


def test_another_hook_that_refuses_the_call(link: Link) -> None:
    """One that is asked first: this call lowered nothing, and there is nothing to go back to."""
    body = watched_over(link)

    def refuse(*_: object) -> None:
        raise RuntimeError("refused")

    handle = body.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(RuntimeError, match="refused"):
        body(ids(1, 1))
    handle.remove()
    body(ids(1, 1))
    assert (body.seen, torch.get_num_threads()) == ([FEWER], THREADS)


def test_no_copy_is_made_of_it(link: Link) -> None:
    """It would compute by way of the original's connection."""
    with pytest.raises(ProtectionError, match="cannot be copied"):
        copy.deepcopy(watched_over(link))


def test_what_a_model_takes_can_still_be_told(link: Link) -> None:
    """transformers asks for the signature of a model's `forward`."""
    assert inspect.signature(watched_over(link).forward) == inspect.signature(Body().forward)
