"""Bodies of requests -> what the engine is asked: tokens, how to draw, when to stop."""

import json
from collections.abc import Sequence
from dataclasses import replace

from obfuscatune.errors import DataError
from obfuscatune.service.api import errors
from obfuscatune.service.api.context import Target
from obfuscatune.service.api.requests import MAX_SEED, ChatBody, CompletionBody
from obfuscatune.service.requests import Request as EngineRequest
from obfuscatune.service.sampling import SamplingParams
from obfuscatune.training.data_files import Line
from obfuscatune.training.layouts import read_messages
from obfuscatune.training.tokens import context_window, encode_open, render_prompt

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""


def completion_prompts(body: CompletionBody, target: Target) -> list[list[int]]:
    """The tokens of each prompt. Raises ApiError: one is no Unicode."""
    return [
        encode_open(target.model.tokenizer, _checked(prompt)) if isinstance(prompt, str) else list(prompt)
        for prompt in body.prompts
    ]


def chat_prompt(body: ChatBody, target: Target) -> list[list[int]]:
    """The tokens of a conversation. Raises ApiError: it is none that the model's template takes."""
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


def engine_request(
    body: CompletionBody | ChatBody, ids: Sequence[int], target: Target, most_tokens: int, seconds: float
) -> EngineRequest:
    """What the engine is asked for one prompt.

    Raises:
        ApiError: it is more than the model, or the service, has room for.
    """
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
        raise refused_by_engine(error) from error


def seeded(request: EngineRequest, seed: int | None, index: int) -> EngineRequest:
    """With the seed of the choice of that number."""
    if seed is None:
        return request
    shifted = seed + index if seed + index <= MAX_SEED else seed + index - 2**64
    return replace(request, sampling=replace(request.sampling, seed=shifted))


def refused_by_engine(error: DataError) -> errors.ApiError:
    """Tell what the engine found wrong with a request."""
    name = str(error).partition(":")[0]
    param = name if name.isidentifier() else None
    return errors.ApiError(400, str(error), param=param, code="invalid_value")
