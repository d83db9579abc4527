"""POST /v1/completions and /v1/chat/completions.

    body  ->  engine_requests  ->  engine  ->  choices  ->  rendering: JSON or server-sent events

Each prompt and each of `n` choices is a request of its own to the engine. With a seed, choice i has the seed plus i.
A client that goes away has its requests cancelled.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from obfuscatune.errors import DataError, ObfuscaTuneError
from obfuscatune.service.access import INFERENCE
from obfuscatune.service.api import errors
from obfuscatune.service.api.choices import Answer, Choice, take
from obfuscatune.service.api.context import Asker, Context, Ctx, counted, find_target
from obfuscatune.service.api.engine_requests import (
    chat_prompt,
    completion_prompts,
    engine_request,
    refused_by_engine,
    seeded,
)
from obfuscatune.service.api.rendering import Streamed, whole
from obfuscatune.service.api.requests import ChatBody, CompletionBody
from obfuscatune.service.keys import Owner

router = APIRouter()


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
        return Streamed(answer)
    try:
        await _collect(answer, request)
    finally:
        await asyncio.shield(to_thread.run_sync(answer.end))
    return JSONResponse(whole(answer))


def _begin(body: CompletionBody | ChatBody, context: Context, owner: Owner, loop: asyncio.AbstractEventLoop) -> Answer:
    """Check everything, and hand it to the engine."""
    limits = context.settings.limits
    target = find_target(context, owner, body.model)
    engine = target.engine
    choices_of_each = body.n or 1
    prompts = chat_prompt(body, target) if isinstance(body, ChatBody) else completion_prompts(body, target)
    if choices_of_each * len(prompts) > limits.choices:
        raise errors.ApiError(
            400, f"At most {limits.choices} choices, of all prompts together.", param="n", code="invalid_value"
        )
    asked = [engine_request(body, ids, target, limits.max_tokens, limits.request_seconds) for ids in prompts]
    most = sum(len(it.prompt) + choices_of_each * it.max_tokens for it in asked)
    prefix = "chatcmpl-" if isinstance(body, ChatBody) else "cmpl-"
    with ExitStack() as stack:
        used = stack.enter_context(counted(context, owner, target, INFERENCE, most))
        choices: list[Choice] = []
        try:
            for number, one in enumerate(asked):
                for repeat in range(choices_of_each):
                    index = number * choices_of_each + repeat
                    handle = engine.submit(seeded(one, body.seed, index), loop)
                    choices.append(Choice(index, handle, one.prompt))
        except DataError as error:
            _cancel(choices)
            raise refused_by_engine(error) from error
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
        take(choice, event)
