"""What the engine is asked, and what it answers."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from obfuscatune.errors import DataError, ObfuscaTuneError
from obfuscatune.service.sampling import MOST_LOGPROBS, SamplingParams, TokenLogprobs

MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 1024
"""Characters."""
MOST_STOP_IDS = 64

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One answer that is asked for. `n` answers are as many requests, each with a seed of its own.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most to write; 0 where the prompt's log-probabilities alone are asked for.
        sampling: how tokens are chosen.
        stop: strings before which the text ends.
        stop_ids: tokens that end it, beside those that the model names.
        logprobs: how many of the likeliest tokens to tell with each token's own log-probability; None tells neither.
        prompt_logprobs: whether to tell `logprobs` of the prompt too.
        adapter: name of the fine-tuned model; None is the model itself.
        timeout_s: seconds within which the answer must be complete, from `submit` on.

    Raises:
        DataError: a value outside its range.
    """

    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams, repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)
    stop_ids: tuple[int, ...] = field(default=(), repr=False)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise DataError("the prompt: expected at least one token")
        if self.max_tokens < 0:
            raise DataError("max_tokens: expected 0 or more")
        if len(self.stop) > MOST_STOP_STRINGS or not all(0 < len(stop) <= LONGEST_STOP_STRING for stop in self.stop):
            raise DataError(
                f"stop: expected up to {MOST_STOP_STRINGS} strings of 1 to {LONGEST_STOP_STRING} characters"
            )
        if len(self.stop_ids) > MOST_STOP_IDS:
            raise DataError(f"stop_ids: expected up to {MOST_STOP_IDS}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise DataError(f"logprobs: expected 0 to {MOST_LOGPROBS}")
        if self.prompt_logprobs and self.logprobs is None:
            raise DataError("prompt_logprobs: expected logprobs beside it")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise DataError("timeout_s: expected more than 0")

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together, at the most."""
        return len(self.prompt) + self.max_tokens

    def check(self, vocabulary: int, window: int) -> None:
        """Return where a model with so many tokens, which takes so many at once, can answer.

        Raises:
            DataError: it cannot.
        """
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in self.prompt):
            raise DataError(f"the prompt: expected tokens from 0 to {vocabulary - 1}")
        if not all(0 <= token < vocabulary for token in self.sampling.logit_bias):
            raise DataError(f"logit_bias: expected tokens from 0 to {vocabulary - 1}")
        if self.length > window:
            raise DataError(
                f"the prompt has {len(self.prompt)} tokens and up to {self.max_tokens} are to be written, but the "
                f"model takes {window} in all; shorten it or lower max_tokens"
            )


@dataclass(frozen=True)
class PromptEvent:
    """The log-probabilities of the prompt's tokens, where they were asked for. Comes first."""

    logprobs: tuple[TokenLogprobs, ...] = field(repr=False)


@dataclass(frozen=True)
class TokenEvent:
    """One token of the answer.

    Attributes:
        token: its id. A token that ends the text has no event.
        text: what may be shown now; empty inside a character, or inside what may become a stop string.
        logprobs: where they were asked for.
    """

    token: int = field(repr=False)
    text: str = field(repr=False)
    logprobs: TokenLogprobs | None = field(default=None, repr=False)


@dataclass(frozen=True)
class FinishEvent:
    """The end of the answer. Comes last.

    Attributes:
        reason: "stop" at a token or string that ends the text, "length" at `max_tokens`, "cancelled" after `cancel`.
        text: what was held back until now.
        prompt_tokens: of the prompt.
        completion_tokens: that were chosen, one that ended the text included.
    """

    reason: FinishReason
    text: str = field(repr=False)
    prompt_tokens: int
    completion_tokens: int


Event = PromptEvent | TokenEvent | FinishEvent


class Handle:
    """The events of one request, in order: `for event in handle`, or `async for` where it was given a loop.

    Iteration ends after the FinishEvent. It raises the error that the request failed with. Events wait for whoever
    reads slowly: there are no more of them than `max_tokens` allows.
    """

    def __init__(self, cancel: Callable[[Handle], None], loop: asyncio.AbstractEventLoop | None) -> None:
        self._cancel = cancel
        self._loop = loop
        self._events: queue.SimpleQueue[Event | ObfuscaTuneError] = queue.SimpleQueue()
        self._async_events: asyncio.Queue[Event | ObfuscaTuneError] = asyncio.Queue()

    def cancel(self) -> None:
        """Have the engine stop at the next token. Iteration then ends with a FinishEvent. From any thread."""
        self._cancel(self)

    def deliver(self, event: Event | ObfuscaTuneError) -> None:
        """Pass an event on; the engine does. If the loop is closed, nobody waits any more."""
        if self._loop is None:
            self._events.put(event)
            return
        try:
            self._loop.call_soon_threadsafe(self._async_events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.cancel()

    def __iter__(self) -> Iterator[Event]:
        event: Event | None = None
        while not isinstance(event, FinishEvent):
            event = _or_raise(self._events.get())
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        event: Event | None = None
        while not isinstance(event, FinishEvent):
            event = _or_raise(await self._async_events.get())
            yield event


def _or_raise(event: Event | ObfuscaTuneError) -> Event:
    if isinstance(event, ObfuscaTuneError):
        raise event
    return event
