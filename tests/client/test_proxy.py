"""The proxy: forwards to the enclave that was verified, and to nothing else; refuses when that has ended."""

import asyncio
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from obfuscatune.channel.identity import Identity
from obfuscatune.client import proxy as module
from obfuscatune.client.connection import pinned_context
from obfuscatune.client.proxy import Standing, Supervisor, make_app
from obfuscatune.errors import ConnectionLost, IntegrityError, UntrustedPeer, VerificationFailed
from tests.client.conftest import served, server_context

# asyncio's TLS transports say so when a loop ends before the other side has closed.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")


class Upstream:
    """What an enclave's API does that a proxy must carry: bodies, streams, errors, escaped paths."""

    def __init__(self):
        self.seen = []
        self.go_on = threading.Event()

    def app(self):
        async def echo(request):
            body = await request.body()
            self.seen.append((request.method, request.scope["raw_path"], request.url.query, dict(request.headers)))
            return JSONResponse({"bytes": len(body)}, 418 if b"teapot" in request.scope["raw_path"] else 200)

        async def stream(_request):
            async def pieces():
                yield b"data: 1\n\n"
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
                yield b"data: 2\n\n"

            return StreamingResponse(pieces(), media_type="text/event-stream")

        methods = ["GET", "POST", "DELETE"]
        return Starlette(routes=[Route("/v1/stream", stream), Route("/{path:path}", echo, methods=methods)])


@pytest.fixture
def upstream():
    return Upstream()


@pytest.fixture
def around(upstream, owner, enclave):
    """A proxy before a real HTTPS server; `verify` can be replaced."""

    @contextmanager
    def start(verify=None, key=None, seconds=100.0, tell=module.log.info):
        with ExitStack() as stack:
            port = stack.enter_context(served(upstream.app(), server_context(enclave, owner)))
            context = pinned_context("127.0.0.1", port, owner, enclave.fingerprint)

            def stand():
                return Standing(f"https://127.0.0.1:{port}", enclave.fingerprint, context, time.monotonic() + seconds)

            supervisor = Supervisor((lambda: verify(stand)) if verify else stand, tell)
            supervisor.check()
            local = stack.enter_context(served(make_app(supervisor, key=key)))
            client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{local}", trust_env=False))
            yield supervisor, client

    return start


def test_requests_and_answers_pass_as_they_are(around, upstream):
    with around() as (_, client):
        headers = {"authorization": "Bearer mine"}
        reply = client.post("/v1/a%2Fb/teapot?x=1&x=2", content=b"z" * 100_000, headers=headers)
        assert (reply.status_code, reply.json()) == (418, {"bytes": 100_000})
        assert client.get("/obfuscatune/v1/status").status_code == 200
        assert client.get("/elsewhere").json()["error"]["code"] == "not_found"
    method, path, query, headers = upstream.seen[0]
    assert (method, path, query) == ("POST", b"/v1/a%2Fb/teapot", "x=1&x=2")
    assert "authorization" not in headers


def test_pieces_of_a_stream_pass_as_they_come_and_end_with_the_standing(around, upstream):
    with around() as (supervisor, client), client.stream("GET", "/v1/stream") as reply:
        pieces = reply.iter_raw()
        assert next(pieces) == b"data: 1\n\n"
        supervisor._standing = None
        upstream.go_on.set()
        assert b"".join(pieces) == b""


def test_nothing_passes_once_the_standing_has_ended(around, upstream):
    with around(seconds=0.0) as (_, client):
        reply = client.get("/v1/models")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "enclave_not_verified")
        assert client.get("/healthz").status_code == 503
    assert upstream.seen == []


def test_evidence_that_is_refused_closes_the_proxy_for_good(around, upstream):
    answers = [True, False, True]

    def verify(stand):
        if answers.pop(0):
            return stand()
        raise VerificationFailed("measurement: another image")

    with around(verify) as (supervisor, client):
        assert client.get("/v1/models").status_code == 200
        assert not supervisor.check()
        assert not supervisor.check()  # the third answer is never asked for
        reply = client.get("/v1/models")
        assert reply.status_code == 503
        assert "another image" in reply.json()["error"]["message"]
    assert len(upstream.seen) == 1
    assert answers == [True]


def test_an_enclave_that_cannot_be_reached_is_verified_again(around):
    lost = [False, True, False]

    def verify(stand):
        if lost.pop(0):
            raise ConnectionLost("nobody listens")
        return stand()

    with around(verify) as (supervisor, client):
        assert supervisor.check()
        assert client.get("/v1/models").status_code == 200  # what was verified counts until it ends
        supervisor._standing = None
        assert "nobody listens" in client.get("/v1/models").json()["error"]["message"]
        assert supervisor.check()
        assert client.get("/v1/models").status_code == 200


def test_a_thread_verifies_again_before_the_standing_ends(around, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_TRIES", 0.05)
    again = threading.Event()
    count = []

    def verify(stand):
        count.append(1)
        if len(count) == 3:
            again.set()
        return stand()

    with around(verify, seconds=0.2):
        assert again.wait(10)


def test_an_enclave_that_went_away_is_a_bad_gateway(around, owner, enclave):
    with served(Upstream().app(), server_context(enclave, owner)) as port:
        context = pinned_context("127.0.0.1", port, owner, enclave.fingerprint)
    with around(lambda _: Standing(f"https://127.0.0.1:{port}", "key", context, time.monotonic() + 100)) as (_, client):
        assert client.get("/v1/models").status_code == 502


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}])
def test_web_pages_of_others_are_refused(around, upstream, headers):
    with around() as (_, client):
        assert client.get("/v1/models", headers=headers).status_code == 403
    assert upstream.seen == []


def test_a_key_is_asked_for_where_one_is_set(around, upstream):
    with around(key="sk-local") as (_, client):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer sk-local"}).status_code == 200
    assert len(upstream.seen) == 1


def test_a_body_above_the_limit_is_refused(around, upstream, monkeypatch):
    monkeypatch.setattr(module, "MOST_BODY_BYTES", 1000)
    with around() as (_, client):
        assert client.post("/v1/files", content=b"x" * 1001).status_code == 413
        assert client.post("/v1/files", content=(b"x" * 400 for _ in range(3))).status_code == 413
        assert client.post("/v1/files", content=b"x" * 1000).status_code == 200
    assert len(upstream.seen) == 1


def test_another_key_than_the_evidence_names_is_refused(owner, enclave):
    other = Identity.generate("other")
    with served(Upstream().app(), server_context(other, owner)) as port, pytest.raises(UntrustedPeer, match="another"):
        pinned_context("127.0.0.1", port, owner, enclave.fingerprint)
    with served(Upstream().app(), server_context(enclave, owner)) as port:
        context = pinned_context("127.0.0.1", port, owner, enclave.fingerprint)
    with served(Upstream().app(), server_context(other, owner)) as port, pytest.raises(httpx.ConnectError):
        httpx.get(f"https://127.0.0.1:{port}/v1/models", verify=context, trust_env=False)


def test_a_log_that_does_not_go_on_closes_the_proxy_between_two_verifications(around, upstream, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.02)
    told = threading.Event()
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 2:
            raise ConnectionLost("it is busy")  # it is verified again, and looked at again
        if len(looks) == 4:
            raise IntegrityError("the audit log does not go on")

    def verify(stand):
        return replace(stand(), check_log=look)

    with around(verify, tell=lambda line: told.set() if "does not go on" in line else None) as (supervisor, client):
        assert told.wait(30)
        reply = client.get("/v1/models")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "enclave_not_verified")
        assert reply.json()["error"]["message"] == "the enclave is refused: the audit log does not go on"
        assert not supervisor.check()
    assert (len(looks), upstream.seen) == (4, [])
