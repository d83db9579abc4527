"""The state: owners see their own, what is private is sealed, a job is never there twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.secret_memory import SecretBytes
from obfuscatune.service import tables as rows
from obfuscatune.service.keys import Owner
from obfuscatune.service.state import Row, State, new_id


def owner(name: str) -> Owner:
    return Owner(name.encode().hex().ljust(64, "0"), b"", SecretBytes(os.urandom(32)))


@pytest.fixture
def state(url: str) -> Iterator[State]:
    made = State(url)
    yield made
    made.close()


def job(state: State, who: Owner, **changes: object) -> Row | None:
    details = {"training_file": "canary-file"}
    return state.add_job(who, new_id("ftjob-"), details, "tiny", **{"idempotency": None, "most": 3, **changes})


def test_owners_are_separated(state: State) -> None:
    one, two = owner("a" + os.urandom(8).hex()), owner("b" + os.urandom(8).hex())
    for who in (one, two):
        assert state.owner_seen(who)
    row = state.add(rows.files, one, new_id("file-"), {"filename": "x"}, stored_bytes=5, purpose="fine-tune")
    assert state.get(rows.files, one, row.id) == row
    assert state.get(rows.files, two, row.id) is None
    assert not state.page(rows.files, two).rows
    assert not state.remove(rows.files, two, row.id)
    assert state.page(rows.files, two, after=row.id).rows == ()
    assert state.stored(one.spki) == (1, 5)
    assert state.remove(rows.files, one, row.id)


def test_an_owner_keeps_his_key(state: State) -> None:
    one = owner("c" + os.urandom(8).hex())
    assert state.owner_seen(one)
    assert not state.owner_seen(one)
    with pytest.raises(IntegrityError):
        state.owner_seen(Owner(one.spki, b"", SecretBytes(os.urandom(32))))


def test_what_is_private_is_sealed_on_disk(tmp_path: Path) -> None:
    made = State(f"sqlite:///{tmp_path / 'state.sqlite'}")
    one = owner("a")
    made.owner_seen(one)
    created = job(made, one)
    assert created is not None
    made.add(rows.events, one, new_id("ftevent-"), {"message": "canary-loss"}, job=created.id)
    made.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert created.id.encode() in stored
    assert b"canary" not in stored


def test_a_sealed_row_stands_for_no_other(state: State) -> None:
    one = owner("d" + os.urandom(8).hex())
    state.owner_seen(one)
    first, second = job(state, one), job(state, one)
    assert first is not None
    assert second is not None
    with state._engine.begin() as connection:  # the disk's owner swaps what he cannot read
        other = connection.execute(select(rows.jobs.c.details).where(rows.jobs.c.id == second.id)).scalar_one()
        connection.execute(update(rows.jobs).where(rows.jobs.c.id == first.id).values(details=other))
    with pytest.raises(IntegrityError):
        state.get(rows.jobs, one, first.id)


def test_jobs_are_counted_and_not_doubled(state: State) -> None:
    one = owner("e" + os.urandom(8).hex())
    state.owner_seen(one)
    key = os.urandom(32).hex()
    first = job(state, one, idempotency=key)
    assert first is not None
    assert job(state, one, idempotency=key) == first
    assert job(state, one) is not None
    assert job(state, one) is not None
    assert job(state, one) is None  # the fourth
    assert state.move_job(first.id, (rows.QUEUED,), rows.CANCELLED)
    assert not state.move_job(first.id, (rows.QUEUED,), rows.RUNNING)
    assert job(state, one) is not None


def test_one_of_many_threads_gets_the_last_place(state: State) -> None:
    one = owner("f" + os.urandom(8).hex())
    state.owner_seen(one)
    made: list[object] = []

    def ask() -> None:
        for _ in range(20):  # PostgreSQL may refuse one of two transactions that cross: it is asked again
            try:
                made.append(job(state, one))
                return
            except StorageError:
                continue

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([it for it in made if it is not None]) == 3
    assert len(made) == 8


def test_a_row_that_is_written_twice_is_there_once(state: State) -> None:
    one = owner("g" + os.urandom(8).hex())
    state.owner_seen(one)
    created = job(state, one)
    assert created is not None
    name = new_id("ftevent-")
    state.add(rows.events, one, name, {"message": "first"}, job=created.id)
    assert state.add(rows.events, one, name, {"message": "second"}, job=created.id).details == {"message": "first"}
    assert len(state.page(rows.events, one, job=created.id).rows) == 1


def test_running_jobs_wait_again_after_a_restart(url: str) -> None:
    before = State(url)
    one = owner("h" + os.urandom(8).hex())
    before.owner_seen(one)
    created = job(before, one)
    assert created is not None
    before.move_job(created.id, (rows.QUEUED,), rows.RUNNING)
    assert before.charge_job(created.id, created.id, 7) == 7
    before.close()
    after = State(url)
    assert after.requeue_running() >= 1
    assert created.id in [it[0] for it in after.waiting_jobs()]
    found = after.get(rows.jobs, one, created.id)
    assert found is not None
    assert found.clear["charged"] == 7
    after.close()


def test_pages_go_on_where_the_last_one_ended(state: State) -> None:
    one = owner("i" + os.urandom(8).hex())
    state.owner_seen(one)
    names = [new_id("file-") for _ in range(5)]
    for name in names:
        state.add(rows.files, one, name, {}, stored_bytes=1, purpose="fine-tune")
    first = state.page(rows.files, one, limit=2)
    second = state.page(rows.files, one, limit=3, after=first.rows[-1].id)
    assert [it.id for it in (*first.rows, *second.rows)] == names[::-1]
    assert (first.has_more, second.has_more) == (True, False)
    assert [it.id for it in state.page(rows.files, one, ascending=True).rows] == names


def test_another_version_s_database_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.sqlite'}"
    made = State(url)
    with made._engine.begin() as connection:
        connection.execute(update(rows.about).values(value="9"))
    made.close()
    with pytest.raises(ConfigError, match="format 9"):
        State(url)
    with pytest.raises(ConfigError, match="database"):
        State("no such://url")
