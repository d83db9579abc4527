"""What every request to a console passes first, and what every answer carries.

    Host             is this console's own name: a page of another host that resolves to it is refused (DNS rebinding)
    Origin           of a request that changes something is this console's own
    session          by cookie; without one there is the page that takes a link's code, and nothing else
    X-CSRF-Token     of a request that changes something is the session's
    size             of a body is bounded before it is read

Answers may load nothing from anywhere else, run no script but ours, and be framed by nobody.
"""

import hmac
import ipaddress
import re
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from obfuscatune.console.pages import text
from obfuscatune.console.sessions import Session, Sessions

COOKIE = "obfuscatune_console"
SAFE = frozenset({"GET", "HEAD"})
METHODS = SAFE | {"POST"}
MOST_FORM_BYTES = 64 * 2**10
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,255})(?::(\d{1,5}))?")


class Guard:
    """Refuses what no page of this console sends.

    Args:
        app: The console's pages, all of them below `base`.
        base: Their path. It is drawn when the console starts: cookies know no ports, so a server at another port of
            this machine gets the cookie only if it knows the path.
        hosts: The only names in `Host`; None for every address that is written as digits, and localhost.
        large: Paths below `base`, and how many bytes a body there may have.
    """

    def __init__(
        self,
        app: ASGIApp,
        sessions: Sessions,
        base: str,
        *,
        hosts: Collection[str] | None = None,
        large: dict[str, int] | None = None,
    ) -> None:
        self._app, self._sessions, self._base = app, sessions, base
        self._hosts, self._large = hosts, large or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        status, scope["session"] = self._judge(scope)
        if status is not None:
            await _refuse(status, guarded)
            return
        path = scope["path"].removeprefix(self._base)
        if scope["session"] is None and not (path == "/enter" or path.startswith("/static/")):
            is_page = scope["method"] in SAFE and "hx-request" not in Headers(scope=scope)
            await _refuse(303 if is_page else 401, guarded, location=f"{self._base}/enter")
            return
        bounded = _Bounded(receive, self._large.get(path, MOST_FORM_BYTES))
        try:
            await self._app(scope, bounded.receive, guarded)
        except _TooLargeError:
            await _refuse(413, guarded)

    def _judge(self, scope: Scope) -> tuple[int | None, Session | None]:
        """The status that a request is refused with, if it is, and whose it is."""
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        if not self._is_ours(headers.getlist("host")):
            return 421, None
        if not path.startswith(self._base + "/"):
            return 404, None
        if method not in METHODS:
            return 405, None
        session = self._sessions.find(cookie_of(headers))
        if method in SAFE:
            return None, session
        if not _is_same_origin(headers):
            return 403, None
        most = self._large.get(path.removeprefix(self._base), MOST_FORM_BYTES)
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            return 411, None
        if int(length) > most:
            return 413, None
        if path == self._base + "/enter":
            return None, session
        if session is None:
            return 401, None
        given = headers.get("x-csrf-token", "")
        if not hmac.compare_digest(given.encode(), session.csrf.encode()):
            return 403, None
        return None, session

    def _is_ours(self, given: list[str]) -> bool:
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None:
            return False
        if self._hosts is not None:
            return given[0].lower() in self._hosts
        name = match[1].strip("[]").lower()
        if name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def cookie_of(headers: Headers) -> str | None:
    """The session's id that a request carries."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    found = cookies.get(COOKIE)
    return None if found is None else found.value


def _is_same_origin(headers: Headers) -> bool:
    """Whether a request that changes something comes of a page of ours. Browsers say so by at least one of two headers.

    Under our `Referrer-Policy` a form's Origin is null; then Sec-Fetch-Site, which no page can set, has to say it.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    ours = f"http://{headers.get('host')}"
    return (site == "same-origin" and origin in (None, "null", ours)) or (site is None and origin == ours)


class _TooLargeError(Exception):
    """More came than was announced or is allowed."""


class _Bounded:
    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _TooLargeError
        return message


async def _refuse(status: int, send: Any, *, location: str = "") -> None:
    body = text(f"guard.{status}").encode() if status != 303 else b""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if status == 303:
        headers.append((b"location", location.encode()))
    elif status == 401:
        headers.append((b"hx-redirect", location.encode()))
    elif status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
