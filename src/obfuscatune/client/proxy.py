"""A local endpoint that speaks OpenAI's API to any client on this machine, and forwards to a verified enclave.

    client on this machine --HTTP--> proxy on 127.0.0.1 --mutual TLS, pinned--> enclave

Nothing is forwarded but under a `Standing` that has not ended: the enclave was verified, not longer ago than the policy
allows. Before it ends the enclave is verified again; between, its audit log must go on from what was seen of it. When
evidence or log are refused, the proxy refuses everything from that moment until it is started again; when the enclave
cannot be reached, until it is verified again.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from obfuscatune.errors import AttestationError, IntegrityError, ObfuscaTuneError, UntrustedPeer

if TYPE_CHECKING:
    import ssl

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

MOST_BODY_BYTES = 512 * 2**20
"""Of one request: OpenAI's limit for a file."""
SECONDS_BETWEEN_TRIES = 2.0
SECONDS_BETWEEN_LOOKS = 30.0
"""At the enclave's audit log."""
_READ_SECONDS = 600.0
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "upgrade"),
    *("transfer-encoding", "host", "content-length", "authorization", "cookie", "set-cookie"),
}
"""Headers that are of one connection only (RFC 9110, section 7.6.1), or of this machine's affairs."""
_REFUSED = (AttestationError, IntegrityError, UntrustedPeer)
"""What trying again does not mend."""
_LOCAL_HOSTS = {"127.0.0.1", "localhost", "[::1]"}


@dataclass(frozen=True)
class Standing:
    """An enclave that was verified, and until when that counts."""

    url: str
    """Of its API, as https://10.0.0.5:8443."""
    spki_sha256: str
    """Of the key that its evidence names, in hex."""
    context: ssl.SSLContext
    """Which accepts that key, and no other."""
    until: float
    """By `time.monotonic`."""
    check_log: Callable[[], None] = lambda: None
    """Sees that its audit log goes on from what was seen before; raises as `HeadFile.follow`."""


@dataclass
class Supervisor:
    """Verifies the enclave, again and again, and says whether requests may pass."""

    verify: Callable[[], Standing]
    """Raises what `connect` raises."""
    tell: Callable[[str], None] = log.info
    _standing: Standing | None = None
    _refusal: str = "the enclave has not been verified yet"
    _closed: bool = False
    _over: threading.Event = field(default_factory=threading.Event)
    _wanted: threading.Event = field(default_factory=threading.Event)

    def standing(self) -> Standing | None:
        """What counts at this moment."""
        found = self._standing
        return found if found is not None and time.monotonic() < found.until else None

    @property
    def refusal(self) -> str:
        """Why nothing passes, in one line."""
        return self._refusal

    def check(self) -> bool:
        """Verify once.

        Returns:
            Whether it is worth trying again: evidence that was refused stays refused.
        """
        if self._closed:
            return False
        try:
            self._standing = self.verify()
        except _REFUSED as error:
            return self._close(error)
        except ObfuscaTuneError as error:
            self._refuse(f"the enclave cannot be verified: {error}")  # what was verified counts until it ends
            return True
        self._refusal = "the last verification has ended"
        return True

    def look(self) -> bool:
        """See that the audit log of the verified enclave goes on; where it does not answer, verify soon.

        Returns:
            As `check`.
        """
        standing = self.standing()
        try:
            if standing is not None:
                standing.check_log()
        except _REFUSED as error:
            return self._close(error)
        except ObfuscaTuneError:
            self.soon()
        return True

    def _close(self, error: ObfuscaTuneError) -> bool:
        self._standing, self._closed = None, True
        self._refuse(f"the enclave is refused: {error}")
        return False

    def soon(self) -> None:
        """Verify again without waiting: a request found the enclave gone."""
        self._wanted.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it a thread verifies the enclave again, halfway through what is left of each standing."""
        thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._wanted.set()
            thread.join()

    def _run(self) -> None:
        due = self._next_check()
        while not self._over.is_set():
            is_wanted = self._wanted.wait(max(0.0, min(due - time.monotonic(), SECONDS_BETWEEN_LOOKS)))
            self._wanted.clear()
            if self._over.is_set():
                return
            is_due = is_wanted or time.monotonic() >= due
            if not (self.check() if is_due else self.look()):
                return
            if is_due:
                due = self._next_check()

    def _next_check(self) -> float:
        """When to verify again, by `time.monotonic`."""
        standing, now = self.standing(), time.monotonic()
        left = 0.0 if standing is None else standing.until - now
        return now + max(SECONDS_BETWEEN_TRIES, left / 2)

    def _refuse(self, why: str) -> None:
        is_new, self._refusal = why != self._refusal, why
        if is_new:
            self.tell(why)


def make_app(supervisor: Supervisor, *, key: str | None = None) -> Starlette:
    """The proxy as an ASGI application.

    Args:
        key: What local clients must send as their API key; None asks for none.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    clients: dict[tuple[str, str], httpx.AsyncClient] = {}

    async def client_of(standing: Standing) -> httpx.AsyncClient:
        """One pool of connections to each enclave; those to one that is no longer it are closed."""
        enclave = standing.url, standing.spki_sha256
        if enclave not in clients:
            while clients:
                await clients.popitem()[1].aclose()
            clients[enclave] = httpx.AsyncClient(
                base_url=standing.url,
                verify=standing.context,
                timeout=httpx.Timeout(10.0, read=_READ_SECONDS, write=60.0),
                trust_env=False,
            )
        return clients[enclave]

    async def forward(request: Request) -> Response:
        if (refused := _refuse_stranger(request, key)) is not None:
            return refused
        standing = supervisor.standing()
        if standing is None:
            return _error(503, supervisor.refusal, "enclave_not_verified")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            return _error(413, f"a request may have {MOST_BODY_BYTES:,} bytes", "request_too_large")
        return await _forwarded(request, await client_of(standing), supervisor)

    async def health(_: Request) -> Response:
        standing = supervisor.standing()
        if standing is None:
            return JSONResponse({"status": "refusing", "reason": supervisor.refusal}, 503)
        return JSONResponse({"status": "verified", "seconds_left": int(standing.until - time.monotonic())})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        with supervisor.running():
            yield
        for client in clients.values():
            await client.aclose()

    methods = ["GET", "POST", "DELETE", "PUT", "PATCH"]
    routes = [
        Route("/healthz", health),
        Route("/v1/{path:path}", forward, methods=methods),
        Route("/obfuscatune/v1/{path:path}", forward, methods=methods),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _not_served})


async def _forwarded(request: Request, client: httpx.AsyncClient, supervisor: Supervisor) -> Response:
    """Send a request on, and stream what comes back for as long as the enclave stands."""
    from starlette.background import BackgroundTask
    from starlette.responses import StreamingResponse

    headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    query = request.scope["query_string"]
    target = request.scope["raw_path"] + (b"?" + query if query else b"")
    sent = client.build_request(
        request.method,
        client.base_url.copy_with(raw_path=target),  # as it came: what is escaped stays so
        headers=headers,
        content=_bounded(request.stream()) if has_body else None,
    )
    try:
        reply = await client.send(sent, stream=True)
    except _BodyTooLargeError:
        return _error(413, f"a request may have {MOST_BODY_BYTES:,} bytes", "request_too_large")
    except httpx.TransportError as error:
        supervisor.soon()
        return _error(502, f"the enclave cannot be reached: {type(error).__name__}", "enclave_unreachable")

    async def body() -> AsyncIterator[bytes]:
        with suppress(httpx.TransportError):  # the client sees that the answer ends early
            async for piece in reply.aiter_raw():
                if supervisor.standing() is None:
                    return
                yield piece

    kept = {name: value for name, value in reply.headers.items() if name not in _HOP_BY_HOP}
    if "content-length" in reply.headers:
        kept["content-length"] = reply.headers["content-length"]  # so that one that is cut off is seen to be
    return StreamingResponse(body(), reply.status_code, kept, background=BackgroundTask(reply.aclose))


class _BodyTooLargeError(Exception):
    """More came than was announced or is allowed."""


async def _bounded(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    total = 0
    async for piece in stream:
        total += len(piece)
        if total > MOST_BODY_BYTES:
            raise _BodyTooLargeError
        yield piece


def _refuse_stranger(request: Request, key: str | None) -> Response | None:
    """Refuse pages of other hosts, which a browser on this machine may have open, and clients without the key.

    A page of another origin reaches 127.0.0.1 by a name that resolves to it: then Host says so. Browsers name the
    origin of every request that is not a page's own.
    """
    host = request.headers.get("host", "").rsplit(":", 1)[0]
    if host not in _LOCAL_HOSTS or "origin" in request.headers:
        return _error(403, "this endpoint serves programs on this machine, not web pages", "not_local")
    if key is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            return _error(401, "give the key that the proxy was started with as the API key", "invalid_api_key")
    return None


async def _not_served(_: Request, error: Exception) -> Response:
    """Another path than the API's, or another method."""
    return _error(getattr(error, "status_code", 404), "there is no such path or method here", "not_found")


def _error(status: int, message: str, code: str) -> Response:
    """An error as OpenAI's clients read it."""
    from starlette.responses import Response

    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(json.dumps(body), status, media_type="application/json")
