"""Who has a place at a worker, and who gives way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from obfuscatune.errors import WorkerRefused
from obfuscatune.protocol.limits import IDLE_SECONDS, REPLACED_AFTER_SECONDS
from obfuscatune.worker import sessions as module
from obfuscatune.worker.quota import SessionKey
from obfuscatune.worker.sessions import Session, Sessions


class Places:
    """Four places, a clock, and what sessions hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.held: dict[SessionKey, int] = {}
        self.ended: list[str] = []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.sessions = Sessions(4, self)

    def held_by(self, session: SessionKey) -> int:
        return self.held.get(session, 0)

    def forget_session(self, session: SessionKey) -> None:
        self.held.pop(session, None)
        self.ended.append(session.digest.decode())

    def enter(self, peer: str, name: str, held: int = 8) -> Session:
        key = SessionKey(peer, name.encode())
        session = self.sessions.enter(key, self.hang_up)
        self.held[key] = held
        return session

    def hang_up(self) -> None:
        pass


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(monkeypatch)


def test_a_session_at_work_gives_way_to_none_of_its_own_peer(places: Places) -> None:
    for name in "abcd":
        places.enter("one", name)
    with pytest.raises(WorkerRefused, match="4 sessions of yours"):
        places.enter("one", "e")


def test_one_that_was_idle_for_a_while_does_and_first_the_one_that_holds_least(places: Places) -> None:
    """An evaluation takes minutes, and holds a model; what holds four bytes goes before it."""
    for name, held in zip("abcd", (10**9, 4, 10**9, 10**9), strict=True):
        places.enter("one", name, held)
    places.now += 2 * REPLACED_AFTER_SECONDS
    places.enter("one", "e")
    assert places.ended == ["b"]


def test_one_that_left_for_a_moment_keeps_its_place_against_other_peers(places: Places) -> None:
    sessions = [places.enter(peer, peer) for peer in "abcd"]
    places.sessions.leave(sessions[2], places.hang_up)
    with pytest.raises(WorkerRefused, match="0 sessions of yours"):
        places.enter("e", "e")
    places.now += 2 * REPLACED_AFTER_SECONDS
    places.enter("e", "e")
    assert places.ended == ["c"]


def test_a_peer_with_many_gives_way_to_one_with_few(places: Places) -> None:
    for peer, name in (("many", "a"), ("few", "b"), ("many", "c"), ("many", "d")):
        places.now += 1
        places.enter(peer, name)
    places.enter("new", "e")
    assert places.ended == ["a"]


def test_what_a_session_brings_after_its_end_is_dropped_when_it_leaves(places: Places) -> None:
    """It gave way in the middle of a STORE."""
    session = places.enter("many", "a")
    for name in "bcd":
        places.enter("many", name)
    places.enter("new", "e")
    places.held[session.key] = 8
    places.sessions.leave(session, places.hang_up)
    assert not places.held_by(session.key)


def test_what_is_held_is_seen_when_the_last_connection_leaves(places: Places) -> None:
    """Not before: another connection of the session may store something in between."""
    session = places.enter("one", "a", held=0)
    places.sessions.enter(session.key, places.hang_up)
    places.sessions.leave(session, places.hang_up)
    places.held[session.key] = 8
    places.sessions.leave(session, places.hang_up)
    assert not places.ended
    places.now += 2 * IDLE_SECONDS
    places.enter("two", "b")
    assert places.ended == ["a"]
