"""Answers in OpenAI's form: JSON when they are complete, or server-sent events while they come."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from anyio import to_thread
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from obfuscatune.errors import ObfuscaTuneError
from obfuscatune.service.api import errors, logprobs
from obfuscatune.service.api.choices import Answer, Choice, take
from obfuscatune.service.api.requests import CompletionBody
from obfuscatune.service.requests import FinishEvent, PromptEvent, TokenEvent

_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def whole(answer: Answer) -> dict[str, Any]:
    """An answer that is complete."""
    choices = [_chat_choice(answer, it) if answer.is_chat else _text_choice(answer, it) for it in answer.choices]
    kind = "chat.completion" if answer.is_chat else "text_completion"
    return {**answer.head(kind), "choices": choices, "usage": answer.usage}


def _chat_choice(answer: Answer, choice: Choice) -> dict[str, Any]:
    tokenizer = answer.target.model.tokenizer
    told = logprobs.of_chat(tokenizer, choice.tokens) if answer.body.logprobs else None
    message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
    return _part(choice, {"message": message}, told, _reason(choice))


def _text_choice(answer: Answer, choice: Choice) -> dict[str, Any]:
    tokenizer, told = answer.target.model.tokenizer, None
    echoed = _prompt_text(answer, choice) if isinstance(answer.body, CompletionBody) and answer.body.echo else ""
    if answer.body.logprobs is not None:
        before = () if choice.prompt_logprobs is None else choice.prompt_logprobs.logprobs
        told = logprobs.of_text(tokenizer, choice.prompt if echoed else (), before, choice.tokens, 0)
    return _part(choice, {"text": echoed + "".join(choice.text)}, told, _reason(choice))


def _part(choice: Choice, said: dict[str, Any], told: Any = None, reason: str | None = None) -> dict[str, Any]:
    """A choice, or a piece of one that is still coming."""
    return {"index": choice.index, **said, "logprobs": told, "finish_reason": reason}


def _prompt_text(answer: Answer, choice: Choice) -> str:
    return str(answer.target.model.tokenizer.decode(choice.prompt, skip_special_tokens=False))


def _reason(choice: Choice) -> str:
    return "length" if choice.finish is not None and choice.finish.reason == "length" else "stop"


async def _stream(answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events, in the order in which tokens come; an error ends them with an event of its own."""
    events: asyncio.Queue[tuple[Choice, Any]] = asyncio.Queue(maxsize=256)

    async def feed(choice: Choice) -> None:
        try:
            async for event in choice.handle:
                await events.put((choice, event))
        except ObfuscaTuneError as error:
            await events.put((choice, error))

    tasks = [asyncio.create_task(feed(choice)) for choice in answer.choices]
    try:
        for choice in answer.choices:
            for chunk in _first_chunks(answer, choice):
                yield _event(chunk)
        open_choices = len(answer.choices)
        offsets = dict.fromkeys((it.index for it in answer.choices), 0)
        while open_choices:
            choice, event = await events.get()
            if isinstance(event, ObfuscaTuneError):
                yield _event(errors.from_error(event).body)
                return
            take(choice, event)
            open_choices -= isinstance(event, FinishEvent)
            for chunk in _chunks(answer, choice, event, offsets):
                yield _event(chunk)
        if answer.body.wants_usage:
            kind = "chat.completion.chunk" if answer.is_chat else "text_completion"
            yield _event({**answer.head(kind), "choices": [], "usage": answer.usage})
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


class Streamed(StreamingResponse):
    """A stream; however it ends, and even if it never began, the answer is ended."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(_stream(answer), media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(to_thread.run_sync(self._answer.end))


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _chunk(answer: Answer, choice: dict[str, Any]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if answer.is_chat else "text_completion"
    usage: dict[str, Any] = {"usage": None} if answer.body.wants_usage else {}
    return {**answer.head(kind), "choices": [choice], **usage}


def _first_chunks(answer: Answer, choice: Choice) -> list[dict[str, Any]]:
    if answer.is_chat:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [_chunk(answer, _part(choice, {"delta": delta}))]
    if isinstance(answer.body, CompletionBody) and answer.body.echo and answer.body.logprobs is None:
        return [_chunk(answer, _part(choice, {"text": _prompt_text(answer, choice)}))]
    return []


def _chunks(answer: Answer, choice: Choice, event: Any, offsets: dict[int, int]) -> list[dict[str, Any]]:
    tokenizer, wants = answer.target.model.tokenizer, answer.body.logprobs
    told: Any = None
    text, tokens = getattr(event, "text", ""), [event] if isinstance(event, TokenEvent) else []
    if answer.is_chat:
        if wants and tokens:
            told = logprobs.of_chat(tokenizer, tokens)
        said: dict[str, Any] = {"delta": {"content": text} if text or told else {}}
    else:
        prompt: Sequence[int] = ()
        before: Any = ()
        if isinstance(event, PromptEvent):
            prompt, before = choice.prompt, event.logprobs
            text = _prompt_text(answer, choice)
        if wants is not None and (tokens or prompt):
            told = logprobs.of_text(tokenizer, prompt, before, tokens, offsets[choice.index])
            offsets[choice.index] += sum(len(token) for token in told["tokens"])
        said = {"text": text}
    found = [_part(choice, said, told)] if text or told else []
    if isinstance(event, FinishEvent):
        found.append(_part(choice, {"delta": {}} if answer.is_chat else {"text": ""}, None, _reason(choice)))
    return [_chunk(answer, it) for it in found]
