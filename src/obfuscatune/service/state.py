"""What a service must not forget: owners, files, jobs with their events and checkpoints, fine-tuned models, usage.

Kept by SQLAlchemy, in SQLite or PostgreSQL, on a disk that belongs to somebody else. Columns that speak of private
things are sealed by their owner's key, bound to table and row: names of files, hyperparameters, messages, metrics,
digests. What schedules and separates is in clear: random ids, owners' keys, status, times, sizes.

Every method of an owner's sees that owner's rows alone. What another owner has is not there.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, delete, event, func, insert, make_url, select, update
from sqlalchemy.exc import IntegrityError as ConstraintError
from sqlalchemy.exc import SQLAlchemyError

from obfuscatune.errors import ConfigError, IntegrityError, StorageError
from obfuscatune.service.keys import Owner
from obfuscatune.service.tables import ENDED, QUEUED, RUNNING, about, files, jobs, metadata, owners, usage

FORMAT = 1
_PADDED_TO = 256
"""Bytes that a sealed column is filled up to a multiple of: its length tells little."""


@dataclass(frozen=True)
class Row:
    """A row of an owner's, opened."""

    id: str
    owner: str
    created_at: int
    details: Mapping[str, Any]
    """What is sealed."""
    clear: Mapping[str, Any]
    """The table's other columns."""


@dataclass(frozen=True)
class Page:
    """Rows in order, and whether there are more."""

    rows: Sequence[Row]
    has_more: bool


class State:
    """The database. Safe from any thread."""

    def __init__(self, url: str) -> None:
        """Connect, and make the tables if they are missing.

        Raises:
            ConfigError: the URL cannot be used, or the database is of another version.
            StorageError: the database refused.
        """
        try:
            parsed = make_url(url)
            is_sqlite = parsed.get_backend_name() == "sqlite"
            if is_sqlite and parsed.database:
                Path(parsed.database).touch(mode=0o600)
            self._engine = create_engine(
                parsed,
                isolation_level="AUTOCOMMIT" if is_sqlite else "SERIALIZABLE",
                hide_parameters=True,
                **({"connect_args": {"timeout": 30}} if is_sqlite else {"pool_pre_ping": True}),
            )
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise ConfigError(f"database: {_said(error)}") from error
        self._is_sqlite = is_sqlite
        if is_sqlite:
            event.listen(self._engine, "connect", _settle_sqlite)
        with self.writing() as connection:
            metadata.create_all(connection)
            found = connection.scalar(select(about.c.value).where(about.c.name == "format"))
            if found is None:
                connection.execute(insert(about).values(name="format", value=str(FORMAT)))
            elif found != str(FORMAT):
                raise ConfigError(f"database: format {found}; this version reads format {FORMAT} alone")

    def close(self) -> None:
        """Disconnect."""
        self._engine.dispose()

    def owner_seen(self, owner: Owner) -> bool:
        """Note an owner whose key was released; whether it is a new one.

        Raises:
            IntegrityError: it is another key than that under which the owner's rows are sealed.
        """
        with self.writing() as connection:
            found = connection.scalar(select(owners.c.check).where(owners.c.owner == owner.spki))
            if found is not None:
                owner.open(found, "owner", owner.spki)
                return False
            check = owner.seal(b"", "owner", owner.spki)
            connection.execute(insert(owners).values(owner=owner.spki, created_at=_now(), check=check))
            return True

    def tokens_used(self, grant: str) -> int:
        """Tokens that were read and written under a grant."""
        with self.reading() as connection:
            return int(connection.scalar(select(usage.c.tokens).where(usage.c.grant == grant)) or 0)

    def use_tokens(self, grant: str, tokens: int) -> int:
        """Add to, or take back from, what a grant has used; the sum."""
        with self.writing() as connection:
            return _use_tokens(connection, grant, tokens)

    def add(self, table: Table, owner: Owner, row_id: str, details: Mapping[str, Any], **clear: Any) -> Row:
        """Insert a row; where there is one of that id already, it stays, and is returned.

        Raises:
            StorageError: the database refused.
        """
        values = {"id": row_id, "owner": owner.spki, "created_at": _now(), **clear}
        sealed = _sealed(owner, table, row_id, details)
        with self.writing() as connection:
            before = select(table).where(table.c.id == row_id, table.c.owner == owner.spki)
            found = connection.execute(before).mappings().first()
            if found is not None:
                return _opened(owner, table, dict(found))
            connection.execute(insert(table).values(details=sealed, **values))
        return Row(row_id, owner.spki, values["created_at"], details, clear)

    def get(self, table: Table, owner: Owner, row_id: str) -> Row | None:
        """A row of an owner's; None where that owner has none of that id."""
        if not _is_id(row_id):
            return None
        query = select(table).where(table.c.id == row_id, table.c.owner == owner.spki)
        with self.reading() as connection:
            found = connection.execute(query).mappings().first()
        return None if found is None else _opened(owner, table, dict(found))

    def page(
        self,
        table: Table,
        owner: Owner,
        *,
        after: str | None = None,
        limit: int = 20,
        ascending: bool = False,
        **where: Any,
    ) -> Page:
        """Rows of an owner's, the newest first or last, after the one with that id."""
        if after is not None and not _is_id(after):
            return Page((), False)
        query = select(table).where(table.c.owner == owner.spki)
        for name, value in where.items():
            query = query.where(table.c[name] == value)
        with self.reading() as connection:
            if after is not None:
                position = select(table.c.number).where(table.c.id == after, table.c.owner == owner.spki)
                number = connection.scalar(position)
                if number is None:
                    return Page((), False)
                query = query.where(table.c.number > number if ascending else table.c.number < number)
            order = table.c.number.asc() if ascending else table.c.number.desc()
            found = connection.execute(query.order_by(order).limit(limit + 1)).mappings().all()
        return Page([_opened(owner, table, dict(row)) for row in found[:limit]], len(found) > limit)

    def change(self, table: Table, owner: Owner, row_id: str, details: Mapping[str, Any]) -> None:
        """Replace a row's sealed part."""
        sealed = _sealed(owner, table, row_id, details)
        with self.writing() as connection:
            mine = update(table).where(table.c.id == row_id, table.c.owner == owner.spki)
            connection.execute(mine.values(details=sealed))

    def remove(self, table: Table, owner: Owner, row_id: str) -> bool:
        """Delete a row; whether there was one."""
        with self.writing() as connection:
            mine = delete(table).where(table.c.id == row_id, table.c.owner == owner.spki)
            return bool(connection.execute(mine).rowcount)

    def stored(self, owner: str) -> tuple[int, int]:
        """Number and bytes of an owner's files."""
        query = select(func.count(), func.coalesce(func.sum(files.c.stored_bytes), 0)).where(files.c.owner == owner)
        with self.reading() as connection:
            count, size = connection.execute(query).one()
        return int(count), int(size)

    def ids(self, table: Table) -> set[str]:
        """The ids of all owners' rows."""
        with self.reading() as connection:
            return set(connection.scalars(select(table.c.id)))

    def add_job(
        self, owner: Owner, row_id: str, details: Mapping[str, Any], model: str, *, idempotency: str | None, most: int
    ) -> Row | None:
        """Queue a job; one of the same idempotency key is returned in its place. None where `most` have not ended."""
        sealed = _sealed(owner, jobs, row_id, details)
        values = {"id": row_id, "owner": owner.spki, "created_at": _now(), "details": sealed, "model": model}
        with self.writing() as connection:
            if idempotency is not None:
                before = select(jobs).where(jobs.c.idempotency == idempotency, jobs.c.owner == owner.spki)
                found = connection.execute(before).mappings().first()
                if found is not None:
                    return _opened(owner, jobs, dict(found))
            going = select(func.count()).where(jobs.c.owner == owner.spki, jobs.c.status.not_in(ENDED))
            if (connection.scalar(going) or 0) >= most:
                return None
            connection.execute(insert(jobs).values({**values, "status": QUEUED, "idempotency": idempotency}))
            made = connection.execute(select(jobs).where(jobs.c.id == row_id)).mappings().one()
            return _opened(owner, jobs, dict(made))

    def move_job(
        self,
        job: str,
        before: Sequence[str],
        after: str,
        *,
        owner: Owner | None = None,
        details: Mapping[str, Any] | None = None,
        **clear: Any,
    ) -> bool:
        """Change a job's status, and its sealed part, in one instant, if it is one of `before`; whether it was."""
        if owner is not None and details is not None:
            clear = {**clear, "details": _sealed(owner, jobs, job, details)}
        with self.writing() as connection:
            query = update(jobs).where(jobs.c.id == job, jobs.c.status.in_(before))
            return bool(connection.execute(query.values(status=after, **clear)).rowcount)

    def charge_job(self, job: str, grant: str, tokens: int) -> int:
        """Add a job's tokens to what its grant has used, in one instant with the note that they are charged.

        Returns:
            What the grant has used then.
        """
        with self.writing() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job).values(charged=jobs.c.charged + tokens))
            return _use_tokens(connection, grant, tokens)

    def waiting_jobs(self) -> list[tuple[str, str, str, int]]:
        """(id, owner, model, attempts) of all owners' jobs that are queued, the oldest first."""
        query = select(jobs.c.id, jobs.c.owner, jobs.c.model, jobs.c.attempts).where(jobs.c.status == QUEUED)
        with self.reading() as connection:
            return [tuple(row) for row in connection.execute(query.order_by(jobs.c.number))]

    def job_states(self) -> dict[str, int]:
        """Number of jobs of each status, of all owners together."""
        query = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        with self.reading() as connection:
            return {str(status): int(count) for status, count in connection.execute(query)}

    def requeue_running(self) -> int:
        """Queue what was running when the service ended; how many these were."""
        with self.writing() as connection:
            return connection.execute(update(jobs).where(jobs.c.status == RUNNING).values(status=QUEUED)).rowcount

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that nobody else's interleaves with; it is on disk when this ends.

        Raises:
            StorageError: the database refused, or another transaction crossed this one.
        """
        with self._failures(), self._engine.connect() as connection:
            if not self._is_sqlite:
                with connection.begin():
                    yield connection
                return
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to ask. Raises StorageError: the database refused."""
        with self._failures(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ConstraintError as error:
            raise StorageError(f"the database refused a row: {_said(error)}") from None
        except SQLAlchemyError as error:
            raise StorageError(f"the database refused: {_said(error)}") from None


def _use_tokens(connection: Connection, grant: str, tokens: int) -> int:
    raised = update(usage).where(usage.c.grant == grant).values(tokens=usage.c.tokens + tokens)
    if not connection.execute(raised).rowcount:
        connection.execute(insert(usage).values(grant=grant, tokens=max(0, tokens)))
    return int(connection.scalar(select(usage.c.tokens).where(usage.c.grant == grant)) or 0)


def new_id(prefix: str) -> str:
    """A random id in OpenAI's form: `file-…`, `ftjob-…`."""
    return f"{prefix}{secrets.token_hex(12)}"


def _is_id(text: str) -> bool:
    """Whether a row may have that id; no other text comes near the database."""
    return len(text) <= 64 and text.isascii() and text.isprintable()


def _now() -> int:
    return int(time.time())


def padded(content: bytes) -> bytes:
    """JSON, filled up so that its length tells little."""
    return content + b" " * (-len(content) % _PADDED_TO)


def _sealed(owner: Owner, table: Table, row_id: str, details: Mapping[str, Any]) -> bytes:
    content = json.dumps(dict(details), separators=(",", ":"), allow_nan=False).encode()
    return owner.seal(padded(content), f"row/{table.name}", row_id)


def _opened(owner: Owner, table: Table, row: Mapping[str, Any]) -> Row:
    content = owner.open(row["details"], f"row/{table.name}", row["id"])
    try:
        details = json.loads(content)
    except ValueError as error:
        raise IntegrityError(f"a row of {table.name} holds no JSON") from error
    common = {"number", "id", "owner", "created_at", "details"}
    clear = {name: value for name, value in row.items() if name not in common}
    return Row(row["id"], row["owner"], row["created_at"], details, clear)


def _settle_sqlite(connection: Any, _record: Any) -> None:
    """Every commit is on disk; readers and a writer do not wait for each other."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "trusted_schema=OFF"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _said(error: BaseException) -> str:
    """The driver's own message, without the statement and its values."""
    return " ".join(str(getattr(error, "orig", None) or type(error).__name__).split())[:200]
