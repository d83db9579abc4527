"""POST /v1/completions and /v1/chat/completions: prompts to the engine, its events to JSON or server-sent events.

Each prompt and each of `n` choices is a request of its own to the engine. With a seed, choice i has the seed plus i.
A client that goes away has its requests cancelled.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from obfuscatune.errors import DataError, ObfuscaTuneError
from obfuscatune.service.access import INFERENCE
from obfuscatune.service.api import errors, logprobs
from obfuscatune.service.api.context import Asker, Context, Ctx, Target, counted, find_target
from obfuscatune.service.api.requests import MAX_SEED, ChatBody, CompletionBody
from obfuscatune.service.keys import Owner
from obfuscatune.service.requests import FinishEvent, Handle, PromptEvent, TokenEvent
from obfuscatune.service.requests import Request as EngineRequest
from obfuscatune.service.sampling import SamplingParams
from obfuscatune.training.data_files import Line
from obfuscatune.training.layouts import read_messages
from obfuscatune.training.tokens import context_window, encode_open, render_prompt

router = APIRouter()
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@dataclass
class Choice:
    """One answer while it comes."""

    index: int
    handle: Handle
    prompt: Sequence[int]
    text: list[str] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    prompt_logprobs: PromptEvent | None = None
    finish: FinishEvent | None = None


@dataclass
class Answer:
    """All choices of one request."""

    context: Context
    owner: Owner
    target: Target
    body: CompletionBody | ChatBody
    prompts: list[list[int]]
    choices: list[Choice]
    id: str
    created: int
    resources: ExitStack
    used: list[int]

    @property
    def is_chat(self) -> bool:
        """Whether it is answered in the form of a chat."""
        return isinstance(self.body, ChatBody)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them: a prompt once, however many choices it has."""
        prompt = sum(len(ids) for ids in self.prompts)
        completion = sum(it.finish.completion_tokens for it in self.choices if it.finish is not None)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that each object of the answer has."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.target.name,
            "system_fingerprint": f"fp_{self.target.model.digest[:12]}",
        }

    def end(self) -> None:
        """Cancel what still runs, and settle the account. Blocks."""
        for choice in self.choices:
            if choice.finish is None:
                choice.handle.cancel()
        done = sum((len(it.tokens) if it.finish is None else it.finish.completion_tokens) for it in self.choices)
        read = sum(len(ids) for ids in self.prompts)
        self.used.append(read + done)
        self.context.metrics.tokens.labels("prompt").inc(read)
        self.context.metrics.tokens.labels("completion").inc(done)
        self.resources.close()
        self.context.log.append(
            self.owner.spki,
            "chat" if self.is_chat else "completion",
            {"model": self.target.grant.model, "grant": self.target.grant.id, "prompt": read, "completion": done},
        )


@router.post("/v1/completions", tags=["completions"])
async def completions(body: CompletionBody, request: Request, context: Ctx, owner: Asker) -> Any:
    """Continue a prompt."""
    return await _answer(body, request, context, owner)


@router.post("/v1/chat/completions", tags=["chat"])
async def chat_completions(body: ChatBody, request: Request, context: Ctx, owner: Asker) -> Any:
    """Answer a conversation."""
    return await _answer(body, request, context, owner)


async def _answer(body: CompletionBody | ChatBody, request: Request, context: Context, owner: Owner) -> Any:
    loop = asyncio.get_running_loop()
    answer = await to_thread.run_sync(_begin, body, context, owner, loop)
    if body.stream:
        return _Streamed(answer)
    try:
        await _collect(answer, request)
    finally:
        await asyncio.shield(to_thread.run_sync(answer.end))
    return JSONResponse(_whole(answer))


def _begin(body: CompletionBody | ChatBody, context: Context, owner: Owner, loop: asyncio.AbstractEventLoop) -> Answer:
    """Check everything, and hand it to the engine."""
    limits = context.settings.limits
    target = find_target(context, owner, body.model)
    engine = target.engine
    choices_of_each = body.n or 1
    prompts = _chat_prompt(body, target) if isinstance(body, ChatBody) else _prompts(body, target)
    if choices_of_each * len(prompts) > limits.choices:
        raise errors.ApiError(
            400, f"At most {limits.choices} choices, of all prompts together.", param="n", code="invalid_value"
        )
    asked = [_request(body, ids, target, limits.max_tokens, limits.request_seconds) for ids in prompts]
    most = sum(len(it.prompt) + choices_of_each * it.max_tokens for it in asked)
    prefix = "chatcmpl-" if isinstance(body, ChatBody) else "cmpl-"
    with ExitStack() as stack:
        used = stack.enter_context(counted(context, owner, target, INFERENCE, most))
        choices: list[Choice] = []
        try:
            for number, one in enumerate(asked):
                for repeat in range(choices_of_each):
                    index = number * choices_of_each + repeat
                    handle = engine.submit(_seeded(one, body.seed, index), loop)
                    choices.append(Choice(index, handle, one.prompt))
        except DataError as error:
            _cancel(choices)
            raise _refused_by_engine(error) from error
        except ObfuscaTuneError:
            _cancel(choices)
            raise
        context.metrics.running.inc()
        stack.callback(context.metrics.running.dec)
        row_id, resources = prefix + secrets.token_hex(12), stack.pop_all()
    ids = [list(it.prompt) for it in asked]
    return Answer(context, owner, target, body, ids, choices, row_id, int(time.time()), resources, used)


def _cancel(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.handle.cancel()


def _prompts(body: CompletionBody, target: Target) -> list[list[int]]:
    return [
        encode_open(target.model.tokenizer, _checked(prompt)) if isinstance(prompt, str) else list(prompt)
        for prompt in body.prompts
    ]


def _chat_prompt(body: ChatBody, target: Target) -> list[list[int]]:
    try:
        _checked(json.dumps(body.messages, ensure_ascii=False))
        messages = read_messages(Line("the request", {"messages": body.messages}), "messages")
        return [render_prompt(target.model.tokenizer, messages)]
    except DataError as error:
        raise errors.ApiError(400, str(error), param="messages", code="invalid_value") from error


def _checked(text: str) -> str:
    """Text that a tokenizer takes: JSON can write halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise errors.ApiError(400, "A text is not valid Unicode.", code="invalid_value") from error
    return text


def _request(
    body: CompletionBody | ChatBody, ids: Sequence[int], target: Target, most_tokens: int, seconds: float
) -> EngineRequest:
    room = context_window(target.model.config) - len(ids)
    if isinstance(body, ChatBody):
        wanted = body.max_completion_tokens or body.max_tokens
        tell = (body.top_logprobs or 0) if body.logprobs else None
    else:
        wanted, tell = body.max_tokens or DEFAULT_COMPLETION_TOKENS, body.logprobs
    tokens = max(1, min(room, most_tokens)) if wanted is None else wanted
    if tokens > most_tokens:
        raise errors.ApiError(
            400, f"max_tokens is too large: at most {most_tokens} here.", param="max_tokens", code="invalid_value"
        )
    if tokens > room:
        raise errors.ApiError(
            400,
            f"This model's maximum context length is {len(ids) + room} tokens. However, you requested "
            f"{len(ids) + tokens} tokens ({len(ids)} in the prompt; {tokens} for the completion).",
            param="messages" if isinstance(body, ChatBody) else "prompt",
            code="context_length_exceeded",
        )
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    sampling = SamplingParams(
        temperature=temperature if top_p > 0 else 0.0,  # of no share at all, the likeliest alone is left
        top_p=top_p or 1.0,
        logit_bias=body.biases,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )
    try:
        return EngineRequest(
            prompt=tuple(ids),
            max_tokens=tokens,
            sampling=sampling,
            stop=tuple(_checked(stop) for stop in body.stops),
            logprobs=tell,
            prompt_logprobs=tell is not None and isinstance(body, CompletionBody) and bool(body.echo),
            adapter=target.adapter,
            timeout_s=seconds,
        )
    except DataError as error:
        raise _refused_by_engine(error) from error


def _seeded(request: EngineRequest, seed: int | None, index: int) -> EngineRequest:
    from dataclasses import replace

    if seed is None:
        return request
    shifted = seed + index if seed + index <= MAX_SEED else seed + index - 2**64
    return replace(request, sampling=replace(request.sampling, seed=shifted))


def _refused_by_engine(error: DataError) -> errors.ApiError:
    name = str(error).partition(":")[0]
    param = name if name.isidentifier() else None
    return errors.ApiError(400, str(error), param=param, code="invalid_value")


async def _collect(answer: Answer, request: Request) -> None:
    """Wait for all choices; a client that goes away ends it."""
    tasks = [asyncio.create_task(_follow(choice)) for choice in answer.choices]
    gone = asyncio.create_task(_gone(request))
    try:
        left = set(tasks)
        while left:
            done, _ = await asyncio.wait({*left, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone in done:
                raise errors.ApiError(499, "The client closed the connection.")
            left -= done
            for task in done:
                task.result()
    finally:
        for task in (*tasks, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def _follow(choice: Choice) -> None:
    async for event in choice.handle:
        _take(choice, event)


def _take(choice: Choice, event: Any) -> None:
    match event:
        case PromptEvent():
            choice.prompt_logprobs = event
        case TokenEvent():
            choice.tokens.append(event)
            choice.text.append(event.text)
        case FinishEvent():
            choice.text.append(event.text)
            choice.finish = event


def _whole(answer: Answer) -> dict[str, Any]:
    choices = [_chat_choice(answer, it) if answer.is_chat else _text_choice(answer, it) for it in answer.choices]
    kind = "chat.completion" if answer.is_chat else "text_completion"
    return {**answer.head(kind), "choices": choices, "usage": answer.usage}


def _chat_choice(answer: Answer, choice: Choice) -> dict[str, Any]:
    tokenizer = answer.target.model.tokenizer
    told = logprobs.of_chat(tokenizer, choice.tokens) if answer.body.logprobs else None
    message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": told, "finish_reason": _reason(choice)}


def _text_choice(answer: Answer, choice: Choice) -> dict[str, Any]:
    tokenizer, echoed, told = answer.target.model.tokenizer, "", None
    if isinstance(answer.body, CompletionBody) and answer.body.echo:
        echoed = tokenizer.decode(choice.prompt, skip_special_tokens=False)
    if answer.body.logprobs is not None:
        before = () if choice.prompt_logprobs is None else choice.prompt_logprobs.logprobs
        told = logprobs.of_text(tokenizer, choice.prompt if echoed else (), before, choice.tokens, 0)
    text = echoed + "".join(choice.text)
    return {"index": choice.index, "text": text, "logprobs": told, "finish_reason": _reason(choice)}


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
            _take(choice, event)
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


class _Streamed(StreamingResponse):
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
        return [_chunk(answer, {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})]
    if isinstance(answer.body, CompletionBody) and answer.body.echo and answer.body.logprobs is None:
        text = answer.target.model.tokenizer.decode(choice.prompt, skip_special_tokens=False)
        return [_chunk(answer, {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None})]
    return []


def _chunks(answer: Answer, choice: Choice, event: Any, offsets: dict[int, int]) -> list[dict[str, Any]]:
    tokenizer, wants = answer.target.model.tokenizer, answer.body.logprobs
    told: Any = None
    text, tokens = getattr(event, "text", ""), [event] if isinstance(event, TokenEvent) else []
    if answer.is_chat:
        if wants and tokens:
            told = logprobs.of_chat(tokenizer, tokens)
        part: dict[str, Any] = {"delta": {"content": text} if text or told else {}}
    else:
        prompt: Sequence[int] = ()
        before: Any = ()
        if isinstance(event, PromptEvent):
            prompt, before = choice.prompt, event.logprobs
            text = tokenizer.decode(choice.prompt, skip_special_tokens=False)
        if wants is not None and (tokens or prompt):
            told = logprobs.of_text(tokenizer, prompt, before, tokens, offsets[choice.index])
            offsets[choice.index] += sum(len(token) for token in told["tokens"])
        part = {"text": text}
    if not isinstance(event, FinishEvent):
        empty = {"index": choice.index, **part, "logprobs": told, "finish_reason": None}
        return [_chunk(answer, empty)] if text or told else []
    found = [_chunk(answer, {"index": choice.index, **part, "logprobs": None, "finish_reason": None})] if text else []
    last: dict[str, Any] = {"delta": {}} if answer.is_chat else {"text": ""}
    end = {"index": choice.index, **last, "logprobs": None, "finish_reason": _reason(choice)}
    return [*found, _chunk(answer, end)]
