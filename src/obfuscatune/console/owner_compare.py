"""Base and tuned model side by side: two answers to one question, as they come."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
from fastapi import Form, Query, Request
from fastapi.responses import Response, StreamingResponse

from obfuscatune.client import jobs as api
from obfuscatune.client.connection import Service
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.pages import text
from obfuscatune.console.shell import Shell

MOST_PROMPT = 20_000
MOST_TOKENS = 1024
_MOST_LINE = 2**20


def add(shell: Shell, connection: OwnerConnection) -> None:
    """Add the page, and what answers."""

    @shell.router.get("/compare")
    def compare(request: Request, model: Annotated[str, Query(max_length=256)] = "") -> Response:
        """The form. `model`: the tuned one that is chosen at first."""
        names = [str(it.get("id", "")) for it in api.pages(connection.service, "/v1/models")]
        tuned = [it for it in names if it.startswith("ft:")]
        base = [it for it in names if not it.startswith("ft:")]
        chosen = model if model in tuned else next(iter(tuned), "")
        return shell.page(request, "owner/compare.html", models=base, tuned=tuned, chosen=chosen)

    @shell.router.post("/compare/answer")
    def answer(
        model: Annotated[str, Form(min_length=1, max_length=256)],
        prompt: Annotated[str, Form(min_length=1, max_length=MOST_PROMPT)],
        mode: Annotated[Literal["chat", "text"], Form()] = "chat",
        tokens: Annotated[int, Form(ge=1, le=MOST_TOKENS)] = 128,
        temperature: Annotated[float, Form(ge=0, le=2)] = 0.0,
    ) -> Response:
        """One model's answer: a JSON object a line, {"text"} as it comes, at last {"end"} or {"problem"}."""
        body: dict[str, Any] = {"model": model, "stream": True, "max_tokens": tokens, "temperature": temperature}
        if mode == "chat":
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/v1/completions", prompt
        lines = _answer(connection, connection.service, path, body)
        return StreamingResponse(lines, media_type="application/x-ndjson")


def _answer(connection: OwnerConnection, service: Service, path: str, body: dict[str, Any]) -> Iterator[bytes]:
    try:
        with service.http.stream("POST", path, json=body) as reply:
            if reply.is_error:
                reply.read()
                yield _line(problem=_reason(reply.text) or text("compare.failed"))
                return
            for line in reply.iter_lines():
                if connection.seconds_left is None:
                    yield _line(problem=connection.supervisor.refusal)
                    return
                data = line.removeprefix("data: ") if line.startswith("data: ") and len(line) < _MOST_LINE else ""
                if data == "[DONE]":
                    yield _line(end=True)
                elif data and (piece := _piece(data)):
                    yield piece
    except httpx.TransportError:
        connection.supervisor.soon()
        yield _line(problem=text("compare.gone"))


def _piece(data: str) -> bytes | None:
    """What an event of the service adds to the answer."""
    try:
        event = json.loads(data)
        if "error" in event:
            return _line(problem=str(event["error"]["message"])[:400])
        choice = event["choices"][0] if event.get("choices") else {}
        added = choice.get("text") or (choice.get("delta") or {}).get("content")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return _line(problem=text("compare.failed"))
    return _line(text=added) if isinstance(added, str) and added else None


def _reason(reply: str) -> str:
    try:
        return str(json.loads(reply)["error"]["message"])[:400]
    except (ValueError, KeyError, TypeError):
        return ""


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"
