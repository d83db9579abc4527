"""One running service for the tests that speak with it, and databases."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from obfuscatune.enclave.local_worker import LocalWorker
from tests.service.parties import Cloud, Party, ready


@pytest.fixture(scope="session")
def cloud(worker: LocalWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A service with a granted model, and two owners who released their keys; a third one did not."""
    folder = tmp_path_factory.mktemp("cloud")
    owners = [Party.make("first"), Party.make("second"), Party.make("third")]
    made = Cloud(folder, Party.make("provider"), owners, worker.address, limits={"max_tokens": 64, "choices": 4})
    made.prepare()
    made.start()
    try:
        made.grant()
        for owner in owners[:2]:
            made.release(owner)
        ready(made, owners[0])
        yield made
    finally:
        code = made.stop()
    assert code == 0


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of our own, at a unix socket."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL is not on this machine")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # its socket's path is short, and others may enter
    user = None
    if os.geteuid() == 0:  # which PostgreSQL refuses
        user = "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)

    def run(*command: str | Path) -> None:
        subprocess.run([str(it) for it in command], check=True, stdout=-3, stderr=-3, user=user, cwd=folder)

    run("initdb", "-D", folder / "data", "-A", "trust", "-U", "test")
    run("pg_ctl", "-D", folder / "data", "-w", "-o", f"-k {folder} -c listen_addresses=", "-l", folder / "log", "start")
    yield f"postgresql+psycopg://test@/postgres?host={folder}"
    run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture
def own_postgres(postgres: str) -> str:
    """A database of its own on that server."""
    import psycopg

    name = f"d{os.urandom(8).hex()}"
    with psycopg.connect(postgres.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]  # the name is ours
    return postgres.replace("/postgres?", f"/{name}?")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.sqlite'}"
    return str(request.getfixturevalue("postgres"))
