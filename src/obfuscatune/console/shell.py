"""One application for a role's pages: the link, the session, static files, and what goes wrong as a page.

`Shell` is what routes are added to; `Shell.asgi` is what a server serves.
"""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from obfuscatune.console.guard import COOKIE, Guard, cookie_of
from obfuscatune.console.pages import render, style_sheet, text
from obfuscatune.console.sessions import CODE_CHARACTERS, Session, Sessions
from obfuscatune.errors import (
    AttestationError,
    ConfigError,
    ConnectionLost,
    DataError,
    ObfuscaTuneError,
    TermsError,
    UntrustedPeer,
)
from obfuscatune.version import __version__

_STATIC = {
    "console.js": "text/javascript",
    "enter.js": "text/javascript",
    "vendor/htmx.min.js": "text/javascript",
    "vendor/uPlot.iife.min.js": "text/javascript",
    "vendor/uPlot.min.css": "text/css",
}
"""Files that are served, and nothing else of that folder."""
_ICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#0f5f4b"/>'
    b'<path d="M9 20 20 9m-7 14L23 13" stroke="#fff" stroke-width="3" stroke-linecap="round"/></svg>'
)


@dataclass
class Shell:
    """What every console has.

    Attributes:
        role: `owner`, `provider` or `operator`.
        navigation: (path below the base, key of its text) of each page that the menu names.
        tell: Says something where the console was started.
        about: Adds to every page what its frame shows: `standing`, ...
        lost: Is called where the enclave went away while a page asked it.
    """

    role: str
    navigation: tuple[tuple[str, str], ...]
    tell: Callable[[str], None]
    about: Callable[[], dict[str, Any]] = dict
    lost: Callable[[], None] = lambda: None
    base: str = field(default_factory=lambda: f"/{secrets.token_urlsafe(12)}")
    sessions: Sessions = field(default_factory=Sessions)
    router: APIRouter = field(default_factory=APIRouter)
    origin: str = ""
    """Where it is served, as http://127.0.0.1:8010."""
    large: dict[str, int] = field(default_factory=dict)
    """Paths, and how many bytes a body there may have."""

    def link(self) -> str:
        """A new one-time link. What comes after `#` a browser sends to nobody."""
        return f"{self.origin}{self.base}/enter#{self.sessions.new_code()}"

    def page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A whole page, or a part of one, of a template."""
        session: Session | None = request.scope.get("session")
        common = {
            "base": self.base,
            "role": self.role,
            "navigation": self.navigation,
            "path": request.url.path.removeprefix(self.base),
            "csrf": session.csrf if session else "",
            "version": __version__,
            **self.about(),
        }
        return HTMLResponse(render(template, **{**common, **values}), status)

    def redirect(self, path: str) -> Response:
        """To another page of this console, for htmx and for browsers."""
        return Response(status_code=204, headers={"hx-redirect": self.base + path})

    def asgi(self, hosts: Collection[str] | None = None) -> ASGIApp:
        """The application. `hosts`: see `Guard`."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.include_router(self._common(), prefix=self.base)
        app.include_router(self.router, prefix=self.base)
        app.add_exception_handler(ObfuscaTuneError, self._failed)
        app.add_exception_handler(HTTPException, self._failed)
        app.add_exception_handler(RequestValidationError, self._failed)
        return Guard(app, self.sessions, self.base, hosts=hosts, large=self.large)

    def _common(self) -> APIRouter:
        router = APIRouter()

        @router.get("/enter")
        def enter(request: Request) -> Response:
            """The page that takes a link's code."""
            session: Session | None = request.scope.get("session")
            if session is not None:
                return RedirectResponse(f"{self.base}/", 303)
            if (code := self.sessions.renewed_code()) is not None:
                self.tell(text("enter.new_link", link=f"{self.origin}{self.base}/enter#{code}"))
            return self.page(request, "enter.html", failed=False)

        @router.post("/enter")
        async def entered(request: Request) -> Response:
            """Use a link's code up."""
            form = parse_qs((await request.body()).decode("ascii", "replace"), max_num_fields=4)
            session_id = self.sessions.enter((form.get("code") or [""])[0][:CODE_CHARACTERS])
            if session_id is None:
                return self.page(request, "enter.html", status=403, failed=True)
            reply = RedirectResponse(f"{self.base}/", 303)
            reply.set_cookie(COOKIE, session_id, path=self.base, httponly=True, samesite="strict")
            return reply

        @router.post("/leave")
        def leave(request: Request) -> Response:
            """End the session."""
            self.sessions.leave(cookie_of(request.headers))
            reply = self.redirect("/enter")
            reply.delete_cookie(COOKIE, path=self.base, httponly=True, samesite="strict")
            return reply

        @router.get("/static/{name:path}")
        def static(name: str) -> Response:
            """Our own files, and no others."""
            content, kind = static_file(name)
            return Response(content, media_type=kind, headers={"cache-control": "private, max-age=3600"})

        return router

    async def _failed(self, request: Request, error: Exception) -> Response:
        """What went wrong, as a page or, for htmx and our own scripts, as a part of one."""
        if isinstance(error, ConnectionLost):
            self.lost()
        status, key, told = _explained(error)
        is_part = "hx-request" in request.headers
        template = "parts/problem.html" if is_part else "problem.html"
        return self.page(request, template, status=status, problem=key, told=told)


def _explained(error: Exception) -> tuple[int, str, str]:
    """Status, key of the explanation, and the error's own words."""
    match error:
        case AttestationError() | UntrustedPeer():
            return 503, "refused", str(error)
        case TermsError():
            return 403, "terms", str(error)
        case ConfigError() | DataError():
            return 400, "input", str(error)
        case ObfuscaTuneError():
            return 502, "failed", str(error)
        case HTTPException():
            return error.status_code, "missing" if error.status_code == 404 else "failed", ""
        case _:
            return 400, "input", ""


def attachment(content: bytes, name: str, kind: str) -> Response:
    """A file to keep, under a name of ours."""
    return Response(content, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


@cache
def static_file(name: str) -> tuple[bytes, str]:
    """Content and type of a static file.

    Raises:
        HTTPException: there is none of that name.
    """
    if name == "console.css":
        return style_sheet(), "text/css"
    if name == "icon.svg":
        return _ICON, "image/svg+xml"
    if name not in _STATIC:
        raise HTTPException(404)
    return (files("obfuscatune.console") / "static" / name).read_bytes(), _STATIC[name]
