"""The operator's page shows how busy a service is, to whoever opened its link, and nothing private to anybody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace

import httpx
import pytest

from obfuscatune.console.operator import Snapshot, WorkerLoad, _Pace, operator_console
from obfuscatune.service.api.app import make_operator_app
from tests.client.conftest import served

SNAPSHOT = Snapshot(
    versions={"ObfuscaTune": "0.1", "wire": "7"},
    profile="guarded",
    started=1.0,
    workers=(WorkerLoad("compute", "tcp:<b>:1", 10, 20, 30, 1.5, 2, 3), WorkerLoad("mask", "unix:/m", 7)),
    models={"ready": 1, "loading": 0},
    jobs={"running": 1, "queued": 4},
    jobs_at_once=2,
    job_products=99,
    answering=3,
    waiting=256,
    queue=256,
    tokens=1000,
    disk_total=10**12,
    disk_free=10**11,
)


@pytest.fixture
def operator() -> Iterator[tuple[httpx.Client, str, list[str]]]:
    """A browser, the link, and what was told."""
    told: list[str] = []
    shell = operator_console(lambda: SNAPSHOT, told.append)
    with ExitStack() as stack:
        app = make_operator_app(None, shell.asgi(), shell.base)  # type: ignore[arg-type]  # /metrics alone needs one
        port = stack.enter_context(served(app))
        shell.origin = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=shell.origin + shell.base, trust_env=False, headers={"origin": shell.origin})
        yield stack.enter_context(client), shell.link(), told


def test_the_page_is_for_whoever_opened_the_link(operator: tuple[httpx.Client, str, list[str]]) -> None:
    browser, link, told = operator
    assert browser.get("/").status_code == 303
    assert browser.get("/now").status_code == 303
    assert browser.post("/enter", data={"code": link.partition("#")[2]}).status_code == 303
    page = browser.get("/")
    assert page.status_code == 200
    for shown in (
        "256 of 256",
        "tcp:&lt;b&gt;:1",
        "Mask worker",
        "guarded",
        "100 GB",
        "99 products",
        "Protocol to workers",
    ):
        assert shown in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert not told


def test_what_was_there_before_is_there_without_a_link(operator: tuple[httpx.Client, str, list[str]]) -> None:
    browser, _, _ = operator
    origin = str(browser.base_url).rpartition("/")[0].rpartition("/")[0]
    assert httpx.get(f"{origin}/healthz", trust_env=False).json() == {"status": "ok"}
    for path in ("/", "/now", "/enter", "/static/console.js"):
        assert httpx.get(origin + path, trust_env=False).status_code == 404


def test_a_page_of_a_name_is_refused(operator: tuple[httpx.Client, str, list[str]]) -> None:
    browser, _, _ = operator
    for host, status in {"evil.example": 421, "127.0.0.1.evil:80": 421, "[::1]:80": 200, "localhost": 200}.items():
        assert browser.get("/enter", headers={"host": host}).status_code == status, host


def test_a_snapshot_has_no_place_for_what_is_private() -> None:
    texts = {it.name for it in fields(Snapshot) if it.type in (str, "str")}
    texts |= {it.name for it in fields(WorkerLoad) if it.type in (str, "str")}
    assert texts == {"profile", "role", "address"}
    maps = {it.name for it in fields(Snapshot) if re.match(r".*Mapping", str(it.type))}
    assert maps == {"models", "jobs", "versions"}  # by status; by name of what runs


def test_the_load_of_a_worker_is_what_it_did_between_two_looks() -> None:
    now = [100.0]
    pace = _Pace(lambda: now[0])
    assert pace.of(SNAPSHOT).workers == ()
    now[0] += 2.0
    busier = replace(SNAPSHOT, tokens=1050, workers=(replace(SNAPSHOT.workers[0], products=30), SNAPSHOT.workers[1]))
    rates = pace.of(busier)
    assert (rates.tokens, rates.products, rates.workers) == (25.0, 10.0, (10.0, 0.0))
    now[0] += 2.0
    assert pace.of(SNAPSHOT).workers == (0.0, 0.0)  # of a service that began anew
