"""Consoles as they are served, on sockets, before an enclave that attests and an API that may answer anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.owner import owner_console
from obfuscatune.console.provider import ProviderConnection, provider_console
from obfuscatune.console.shell import Shell
from tests.channel.parties import DIGEST, Enclave
from tests.client.conftest import served, server_context

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{1111*1111}}"
JOB = "ftjob-0123456789abcdef01234567"
TUNED = f"ft:llama:12345678:{ATTACK}:0123456789abcdef01234567"


class Handler:
    """What the enclave's channel answers: where the API is, and models of a provider's."""

    def __init__(self) -> None:
        self.api = ""
        self.models: list[dict[str, Any]] = []
        self.came: list[tuple[Any, ...]] = []

    def _answer(self, *came: Any) -> dict[str, Any]:
        self.came.append(came)
        return {"api": self.api, "models": self.models}

    def granted(self, *it: Any) -> dict[str, Any]:
        return self._answer("grant", *it)

    def owner_key(self, *it: Any) -> dict[str, Any]:
        return self._answer("owner-key", *it)

    def revoke(self, *it: Any) -> dict[str, Any]:
        return self._answer("revoke", *it)

    def consent(self, *it: Any) -> dict[str, Any]:
        return self._answer("consent", *it)

    def status(self, *it: Any) -> dict[str, Any]:
        return self._answer("status", *it)


def model_document(text: str = "llama", **changes: Any) -> dict[str, Any]:
    terms = {"owners": [DIGEST], "uses": ["inference", "fine-tuning"], "export": "provider-consent"}
    terms |= {"until": text if text != "llama" else "2099-01-01T00:00:00Z", "tokens": 1000}
    about = {"model": text, "grant": text, "manifest": text if text != "llama" else DIGEST, "status": text}
    return {**about, "terms": terms, "tokens_used": 250, "consented": [], **changes}


def job_document(text: str, status: str = "failed") -> dict[str, Any]:
    about = {"id": JOB, "status": status, "model": text, "fine_tuned_model": text, "created_at": 1, "finished_at": 2}
    more = {"trained_tokens": 3, "training_file": text, "hyperparameters": {text[:20]: text}, "seed": 1}
    return {**about, **more, "error": {"message": text}}


class HostileApi:
    """A service that answers in OpenAI's form, with an attack in every text."""

    def __init__(self) -> None:
        self.came: list[tuple[str, str, bytes]] = []
        self.error: str | None = None
        self.answers: dict[str, Any] = {
            "/obfuscatune/v1/status": {"models": [model_document(ATTACK)]},
            "/v1/files": {"data": [{"id": "file-1", "filename": ATTACK, "bytes": 9, "created_at": 1, "purpose": "x"}]},
            "/v1/models": {"data": [{"id": ATTACK}, {"id": TUNED}]},
            "/v1/fine_tuning/jobs": {"data": [job_document(ATTACK)]},
            f"/v1/fine_tuning/jobs/{JOB}": job_document(ATTACK),
            f"/obfuscatune/v1/jobs/{JOB}/progress": {"running": None},
            f"/v1/fine_tuning/jobs/{JOB}/events": {
                "data": [{"id": "e1", "created_at": 1, "level": "error", "message": ATTACK, "data": None}]
            },
            "/obfuscatune/v1/estimate": {
                **dict.fromkeys(("tokens", "examples", "steps", "tokens_left", "truncated"), ATTACK),
                "enough": False,
            },
        }

    def app(self) -> Starlette:
        async def answer(request: Any) -> Any:
            self.came.append((request.method, request.url.path, await request.body()))
            if self.error is not None:
                return JSONResponse({"error": {"message": self.error}}, 403)
            if "completions" in request.url.path:
                text = json.dumps({"choices": [{"text": ATTACK, "delta": {"content": ATTACK}}]})
                return StreamingResponse(
                    iter([f"data: {text}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"
                )
            return JSONResponse(self.answers.get(request.url.path, {}))

        return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "DELETE"])])


@dataclass
class Served:
    """A console on a socket, and a browser of a kind."""

    shell: Shell
    port: int
    told: list[str]
    connection: Any
    api: HostileApi | None = None
    handler: Handler | None = None
    browser: httpx.Client = field(init=False)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base(self) -> str:
        return self.origin + self.shell.base

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.base, trust_env=False, headers={"origin": self.origin})

    def enter(self, client: httpx.Client) -> httpx.Response:
        return client.post("/enter", data={"code": self.shell.link().partition("#")[2]})

    def csrf(self, client: httpx.Client) -> dict[str, str]:
        found = re.search(r'data-csrf="([^"]+)"', client.get("/").text)
        assert found
        return {"x-csrf-token": found[1]}


def serve(stack: ExitStack, shell: Shell, told: list[str], connection: Any, **more: Any) -> Served:
    hosts: set[str] = set()
    port = stack.enter_context(served(shell.asgi(hosts)))
    hosts |= {f"127.0.0.1:{port}", f"localhost:{port}"}
    shell.origin = f"http://127.0.0.1:{port}"
    console = Served(shell, port, told, connection, **more)
    console.browser = stack.enter_context(console.client())
    console.enter(console.browser)
    return console


@pytest.fixture(scope="module")
def owner_console_served() -> Iterator[Served]:
    """An owner's console before a hostile service."""
    with ExitStack() as stack:
        owner, http_identity, api, handler = (
            Identity.generate("owner"),
            Identity.generate("api"),
            HostileApi(),
            Handler(),
        )
        port = stack.enter_context(served(api.app(), server_context(http_identity, owner)))
        handler.api = f"127.0.0.1:{port}"
        enclave = Enclave(http_key=http_identity.fingerprint)
        enclave.handler = handler  # type: ignore[assignment]
        server = enclave.server()
        server.start()
        stack.callback(server.stop)
        told: list[str] = []

        def connect() -> Attested:
            return Attested.connect(server.address, owner, enclave.policy())

        connection = OwnerConnection(connect, server.address, owner, tell=told.append)
        assert connection.supervisor.check()
        stack.enter_context(connection.running())
        shell = owner_console(connection, told.append)
        yield serve(stack, shell, told, connection, api=api, handler=handler)


@pytest.fixture
def owner_served(owner_console_served: Served) -> Iterator[Served]:
    """The same, with nothing of the last test's."""
    assert owner_console_served.api is not None
    owner_console_served.api.error = None
    owner_console_served.api.came.clear()
    yield owner_console_served
    owner_console_served.connection.supervisor.check()


@pytest.fixture
def provider_served(tmp_path: Path) -> Iterator[Served]:
    """A provider's console before an enclave; `handler` keeps what came."""
    with ExitStack() as stack:
        provider, handler, enclave = Identity.generate("provider"), Handler(), Enclave()
        enclave.handler = handler  # type: ignore[assignment]
        server = enclave.server()
        server.start()
        stack.callback(server.stop)
        told: list[str] = []
        policies = [enclave.policy()]

        def connect() -> Attested:
            return Attested.connect(server.address, provider, policies[-1])

        connection = ProviderConnection(connect, server.address, provider, tmp_path, tmp_path / "releases")
        shell = provider_console(connection, told.append)
        made = serve(stack, shell, told, connection, handler=handler)
        made.policies = policies  # type: ignore[attr-defined]
        made.enclave = enclave  # type: ignore[attr-defined]
        yield made
