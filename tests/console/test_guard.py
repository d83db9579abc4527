"""Who gets in, what is refused, and what every answer carries."""

from __future__ import annotations

import socket

import httpx
import pytest

from obfuscatune.console.guard import COOKIE, HEADERS
from obfuscatune.console.sessions import SESSION_SECONDS, Sessions
from tests.console.conftest import Served

PAGES = (
    "/",
    "/data",
    "/jobs",
    "/jobs/new",
    "/compare",
    "/log",
    "/log.jsonl",
    "/standing",
    "/verification.json",
    "/nothing",
    "/enter",
)
CHANGES = (
    *("/verify", "/leave", "/jobs", "/data/upload", "/data/file-1/delete", "/compare/answer"),
    *(f"/jobs/{'a' * 8}/{it}" for it in ("cancel", "delete", "ask")),
)
STATIC = ("/static/console.css", "/static/console.js", "/static/enter.js", "/static/vendor/htmx.min.js", "/static/x")


@pytest.mark.parametrize("path", [*PAGES, *STATIC])
@pytest.mark.parametrize("known", [True, False])
def test_every_answer_carries_the_policy(owner_served: Served, path: str, known: bool) -> None:
    with owner_served.client() as stranger:
        reply = (owner_served.browser if known else stranger).get(path)
    for name, value in HEADERS.items():
        assert reply.headers[name] == value
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert reply.headers["x-frame-options"] == "DENY"
    assert "set-cookie" not in reply.headers


def test_without_a_session_there_is_nothing_but_the_page_that_takes_a_code(owner_served: Served) -> None:
    with owner_served.client() as stranger:
        for path in PAGES[:-1]:
            reply = stranger.get(path)
            assert reply.status_code == 303
            assert reply.headers["location"] == f"{owner_served.shell.base}/enter"
        assert stranger.get("/jobs", headers={"hx-request": "true"}).status_code == 401
        assert "llama" not in stranger.get("/enter").text


def test_a_link_works_once_and_a_new_one_is_told_where_the_console_runs(owner_served: Served) -> None:
    code = owner_served.shell.link().partition("#")[2]
    with owner_served.client() as first, owner_served.client() as second:
        assert first.post("/enter", data={"code": code}).status_code == 303
        assert first.get("/jobs").status_code == 200
        assert second.post("/enter", data={"code": code}).status_code == 403
        assert second.get("/jobs").status_code == 303
        for wrong in ("", "x", code[:-1], "é" * 100, code * 1000):
            assert second.post("/enter", data={"code": wrong}).status_code == 403


def test_a_session_is_new_and_its_cookie_is_closed_to_scripts_and_other_sites(owner_served: Served) -> None:
    chosen = "A" * 43
    with owner_served.client() as browser:
        browser.cookies.set(COOKIE, chosen, path=owner_served.shell.base)
        reply = owner_served.enter(browser)
        cookie = reply.headers["set-cookie"]
        assert chosen not in cookie
        assert (
            "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and f"Path={owner_served.shell.base}" in cookie
        )
    with owner_served.client() as fixed:
        fixed.cookies.set(COOKIE, chosen, path=owner_served.shell.base)
        assert fixed.get("/jobs").status_code == 303


def test_whoever_signs_out_is_out(owner_served: Served) -> None:
    with owner_served.client() as browser:
        owner_served.enter(browser)
        kept = dict(browser.cookies)
        assert browser.post("/leave", headers=owner_served.csrf(browser)).status_code == 204
        browser.cookies.update(kept)
        assert browser.get("/jobs").status_code == 303


def test_sessions_end_and_are_few() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    session_id = sessions.enter(sessions.new_code())
    assert sessions.find(session_id) is not None
    assert sessions.renewed_code() is None  # too soon
    now[0] = 60.0
    assert sessions.renewed_code() is not None
    assert sessions.renewed_code() is None  # one is out
    now[0] = SESSION_SECONDS + 1.0
    assert sessions.find(session_id) is None
    ids = [sessions.enter(sessions.new_code()) for _ in range(40)]
    assert sum(sessions.find(it) is not None for it in ids) == 16
    assert sessions.find(None) is None and sessions.find("") is None
    assert "csrf" not in repr(sessions.find(ids[-1]))


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"x-csrf-token": None}, 403),
        ({"x-csrf-token": "x" * 43}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": None}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": None, "sec-fetch-site": "none"}, 403),
        ({"cookie": None}, 401),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:80"}, 421),
        ({"host": "127.0.0.1:1"}, 421),
    ],
)
def test_nothing_is_changed_for_another_page(
    owner_served: Served, path: str, changed: dict[str, str | None], status: int
) -> None:
    assert owner_served.api is not None and owner_served.handler is not None
    browser = owner_served.browser
    headers = {"origin": owner_served.origin, **owner_served.csrf(browser)}
    headers["cookie"] = f"{COOKIE}={next(iter(browser.cookies.values()))}"
    owner_served.api.came.clear()
    before = len(owner_served.handler.came)
    for name, value in changed.items():
        headers.pop(name, None)
        if value is not None:
            headers[name] = value
    with httpx.Client(trust_env=False) as bare:
        reply = bare.post(owner_served.base + path, headers=headers, content=b"{}")
    assert reply.status_code == status
    assert not owner_served.api.came and len(owner_served.handler.came) == before
    assert not changed.get("cookie", "") or owner_served.browser.get("/jobs").status_code == 200


def test_a_link_cannot_be_used_up_by_another_page(owner_served: Served) -> None:
    code = owner_served.shell.link().partition("#")[2]
    with httpx.Client(trust_env=False) as bare:
        for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {}, {"sec-fetch-site": "cross-site"}):
            reply = bare.post(owner_served.base + "/enter", data={"code": code}, headers=headers)
            assert reply.status_code == 403
            assert "set-cookie" not in reply.headers
    with owner_served.client() as browser:
        # As browsers send a form under our Referrer-Policy.
        headers = {"origin": "null", "sec-fetch-site": "same-origin"}
        assert browser.post("/enter", data={"code": code}, headers=headers).status_code == 303


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "/enter?next=https://evil.example", "/..//evil"])
def test_nobody_is_sent_elsewhere(owner_served: Served, path: str) -> None:
    with owner_served.client() as stranger, owner_served.client() as browser:
        owner_served.enter(browser)
        for client in (stranger, browser):
            location = client.get(owner_served.base + path).headers.get("location", owner_served.shell.base)
            assert location.startswith(owner_served.shell.base)
            assert "evil" not in location


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_not_used(owner_served: Served, method: str) -> None:
    reply = owner_served.browser.request(method, "/jobs")
    assert reply.status_code == 405
    assert "access-control-allow-origin" not in reply.headers


def test_only_our_own_files_are_served(owner_served: Served) -> None:
    for name in ("../app.py", "..%2f..%2ferrors.py", "vendor/", "vendor/DIGESTS", "/etc/passwd", "%2e%2e/guard.py", ""):
        reply = owner_served.browser.get(f"/static/{name}")
        assert reply.status_code == 404, name


def test_bodies_are_bounded_whatever_they_say_of_their_length(owner_served: Served) -> None:
    headers = owner_served.csrf(owner_served.browser)
    large = owner_served.browser.post("/jobs", headers=headers, content=b"x" * 70_000)
    assert large.status_code == 413
    chunked = owner_served.browser.post("/jobs", headers=headers, content=iter([b"x" * 70_000]))
    assert chunked.status_code == 411
    assert owner_served.api is not None
    assert not any(method == "POST" for method, _, _ in owner_served.api.came)


def test_two_hosts_are_none(owner_served: Served) -> None:
    host = f"127.0.0.1:{owner_served.port}"
    head = f"GET {owner_served.shell.base}/enter HTTP/1.1\r\nHost: {host}\r\nHost: evil.example"
    asked = f"{head}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", owner_served.port), 10) as sock:
        sock.sendall(asked.encode())
        answer = sock.makefile("rb").readline()
    assert b" 400 " in answer or b" 421 " in answer
