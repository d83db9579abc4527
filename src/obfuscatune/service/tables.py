"""The tables of `state`: what is kept in clear, and what lies sealed in `details`."""

from typing import Any

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Table

QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)

Number = BigInteger().with_variant(Integer, "sqlite")
metadata = MetaData()
about = Table("about", metadata, Column("name", String(32), primary_key=True), Column("value", String(64)))
owners = Table(
    "owners",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("created_at", Number, nullable=False),
    Column("check", LargeBinary, nullable=False),
)


def _table(name: str, *columns: Column[Any]) -> Table:
    """A table of an owner's rows; `number` is their order."""
    return Table(
        name,
        metadata,
        Column("number", Number, primary_key=True, autoincrement=True),
        Column("id", String(64), nullable=False, unique=True),
        Column("owner", String(64), ForeignKey("owners.owner"), nullable=False),
        Column("created_at", Number, nullable=False),
        Column("details", LargeBinary, nullable=False),
        *columns,
        Index(f"{name}_of_owner", "owner", "number"),
    )


files = _table("files", Column("stored_bytes", Number, nullable=False), Column("purpose", String(32), nullable=False))
jobs = _table(
    "jobs",
    Column("model", String(128), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("attempts", Integer, nullable=False, default=0),
    Column("charged", Number, nullable=False, default=0),
    Column("idempotency", String(64), unique=True),
)
events = _table("events", Column("job", String(64), ForeignKey("jobs.id"), nullable=False, index=True))
checkpoints = _table("checkpoints", Column("job", String(64), ForeignKey("jobs.id"), nullable=False, index=True))
adapters = _table(
    "adapters",
    Column("job", String(64), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("model", String(128), nullable=False),
)
receipts = _table("receipts", Column("job", String(64), ForeignKey("jobs.id"), nullable=False, unique=True))
usage = Table(
    "usage",
    metadata,
    Column("grant", String(128), primary_key=True),
    Column("tokens", Number, nullable=False),
)
grants = Table(
    "grants",
    metadata,
    Column("provider", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("sequence", Number, nullable=False),
    Column("digest", String(64), nullable=False),
)
revocations = Table(
    "revocations",
    metadata,
    Column("provider", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("sequence", Number, nullable=False),
    Column("signed", LargeBinary, nullable=False),
)
consents = Table(
    "consents",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("provider", String(64), nullable=False, index=True),
    Column("model", String(64), nullable=False),
    Column("manifest", String(64), nullable=False),
    Column("details", LargeBinary, nullable=False),
)
asked = Table(
    "asked",
    metadata,
    Column("provider", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("manifest", String(64), nullable=False),
    Column("details", LargeBinary, nullable=False),
)
