"""Base and tuned model side by side: the same questions to both, and each goes on with its own answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import httpx
from fastapi import Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from obfuscatune.client import jobs as api
from obfuscatune.client.connection import Service
from obfuscatune.console.connection import OwnerConnection
from obfuscatune.console.owner_jobs import granted_models
from obfuscatune.console.pages import text
from obfuscatune.console.shell import Shell

MOST_CHARACTERS = 20_000
"""Of one message."""
MOST_MESSAGES = 129
MOST_BYTES = 2**20
"""Of a conversation."""
MOST_TOKENS = 1024
_MOST_LINE = 2**20


@dataclass(frozen=True)
class Tuned:
    """A tuned model beside its base. `chats`: whether the base's tokenizer has a chat template."""

    name: str
    base: str
    chats: bool


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]


class Question(BaseModel):
    """What one model is asked: to answer a conversation, or to continue the text of its last message."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    mode: Literal["chat", "text"]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 128
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0


def add(shell: Shell, connection: OwnerConnection) -> None:
    """Add the page, and what answers."""
    shell.large["/compare/answer"] = MOST_BYTES

    @shell.router.get("/compare")
    def compare(request: Request, model: Annotated[str, Query(max_length=256)] = "") -> Response:
        """The form. `model`: the tuned one that is chosen at first."""
        tuned = _tuned_models(connection)
        chosen = next((it for it in tuned if it.name == model), tuned[0] if tuned else None)
        return shell.page(request, "owner/compare.html", tuned=tuned, chosen=chosen)

    @shell.router.post("/compare/answer")
    def answer(question: Question) -> Response:
        """One model's answer: a JSON object a line, {"text"} as it comes, at last {"end"} or {"problem"}."""
        body: dict[str, Any] = {"model": question.model, "stream": True, "max_tokens": question.tokens}
        body["temperature"] = question.temperature
        if question.mode == "chat":  # the service renders it by the model's own chat template
            path, body["messages"] = "/v1/chat/completions", [it.model_dump() for it in question.messages]
        else:
            path, body["prompt"] = "/v1/completions", question.messages[-1].content
        lines = _answer(connection, connection.service, path, body)
        return StreamingResponse(lines, media_type="application/x-ndjson")


def _tuned_models(connection: OwnerConnection) -> list[Tuned]:
    names = [str(it.get("id", "")) for it in api.pages(connection.service, "/v1/models")]
    chats = {it.name for it in granted_models(connection) if it.chats}
    bases = {it: it.split(":")[1] for it in names if it.startswith("ft:")}
    return [Tuned(name, base, base in chats) for name, base in bases.items()]


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
