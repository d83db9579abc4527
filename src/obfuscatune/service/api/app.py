"""All routes in one app, and the bounds of a request: its size, its time, and that it is counted."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from obfuscatune.service.api import answers, errors, files, fine_tuning, parties
from obfuscatune.service.api.context import Context
from obfuscatune.service.api.errors import ApiError
from obfuscatune.version import __version__

log = logging.getLogger(__name__)
FORM_OVERHEAD_BYTES = 64 * 2**10
"""Of an upload, besides the file."""
_DISCARDED = 2
"""Times the most that a body may have, up to which it is read before it is refused."""
_FAULTS: dict[int | str, dict[str, Any]] = {
    code: {"model": errors.ErrorBody, "description": text}
    for code, text in (
        (400, "The request is not one that is answered."),
        (401, "The client's certificate is no owner's whose key was released."),
        (403, "The provider's terms do not allow it."),
        (404, "There is no such thing for this owner."),
        (409, "Something else still needs it."),
        (413, "The request is too large."),
        (429, "Too much at once; ask again later."),
        (500, "What is stored cannot be read."),
        (503, "The model cannot answer now."),
    )
}


def make_app(context: Context) -> FastAPI:
    """The app; `context` holds the parts of the service that its routes use."""
    app = FastAPI(
        title="ObfuscaTune",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        separate_input_output_schemas=False,
        responses=_FAULTS,
    )
    app.state.context = context
    errors.install(app)
    for router in (answers.router, files.router, fine_tuning.router, parties.router):
        app.include_router(router)

    @app.get("/healthz", tags=["obfuscatune"])
    def healthz() -> dict[str, str]:
        """Whether the service runs."""
        return {"status": "ok"}

    app.openapi = lambda: _described(app)  # type: ignore[method-assign]  # as FastAPI's documentation has it
    app.add_middleware(Bounds, context=context)
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The schema. Validation answers 400 in OpenAI's form, not FastAPI's 422."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


class Bounds:
    """Bounds what a request may send, counts it, and tells of failures that no route told of."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._context.settings.limits
        is_upload = scope["path"] == "/v1/files" and scope["method"] == "POST"
        most = limits.file_bytes + FORM_OVERHEAD_BYTES if is_upload else limits.body_bytes
        status: int | None = None
        began = time.monotonic()
        bounded = _Body(receive, most, limits.body_seconds)

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not any(name == b"cache-control" for name, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        try:
            if _length(scope) > _DISCARDED * most:
                await errors.answer(_too_large(most))(scope, receive, counted)
                return
            await self._app(scope, bounded.receive, counted)
        except Exception as error:  # noqa: BLE001  further out it would be logged with its text, which may be an owner's
            if status is None:
                await errors.answer(errors.from_error(error))(scope, receive, counted)
            else:
                log.warning("an answer broke off: %s", type(error).__name__)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._context.metrics.requests.labels(route, str(status or 500)).inc()
            self._context.metrics.seconds.labels(route).observe(time.monotonic() - began)


class _Body:
    """A request's body, at most so many bytes within so many seconds."""

    def __init__(self, receive: Callable[[], Awaitable[Message]], most_bytes: int, seconds: float) -> None:
        self._receive, self._most, self._ends = receive, most_bytes, time.monotonic() + seconds
        self._came, self._is_whole = 0, False

    async def receive(self) -> Message:
        """The next part. Raises ApiError: it came too late, or is too much."""
        if self._is_whole:
            return await self._receive()  # whether the client goes away
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._ends - time.monotonic()))
        except TimeoutError:
            raise ApiError(408, "The request did not come in time.", code="timeout") from None
        if message["type"] == "http.request":
            self._came += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._came > self._most:
                await self._discard()
                raise _too_large(self._most)
        return message

    async def _discard(self) -> None:
        """Take what still comes, within bounds: who is cut off in the middle of sending does not read our answer."""
        while not self._is_whole and self._came <= _DISCARDED * self._most and time.monotonic() < self._ends:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.1, self._ends - time.monotonic()))
            except TimeoutError:
                return
            self._came += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"A request has at most {most} bytes.", code="request_too_large", headers={"connection": "close"}
    )


def _length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 16 else 0
    return 0


def make_operator_app(context: Context, console: ASGIApp, base: str) -> ASGIApp:
    """/healthz, /metrics and the console, for the operator's machine: how busy the service is, and nothing of whom.

    Args:
        console: What is below `base`, for whoever opened its link.
    """
    from obfuscatune.service.metrics import CONTENT_TYPE

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"].startswith(base + "/"):
            await console(scope, receive, send)
            return
        known = {"/healthz": (b'{"status":"ok"}', "application/json"), "/metrics": (b"", CONTENT_TYPE)}
        body, kind = known.get(scope["path"], (b"", ""))
        if scope["path"] == "/metrics":
            body = await asyncio.to_thread(context.metrics.render)
        status = 200 if kind and scope["method"] in ("GET", "HEAD") else 404
        headers = [(b"content-type", (kind or "text/plain").encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return app
