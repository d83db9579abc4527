"""Continuous batching: requests -> tokens, over one model, protected or plain.

    submit  ->  queue  ->  admitted, as memory allows  ->  Prefill, a chunk a step  ->  Group of its adapter
                                                                                    ->  one token each a step

One thread owns the model. In each of its steps newcomers' prompts are read a chunk further, and every running sequence
gets one token: a newcomer joins between two tokens, whoever finishes leaves, and no prompt stalls the others for longer
than a chunk takes.

docs/adr/0022-continuous-batching.md has the reasons.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from obfuscatune.errors import (
    BudgetExceeded,
    DataError,
    ObfuscaTuneError,
    Overloaded,
    RequestTimeout,
    ServiceClosed,
    ServiceError,
    UntrustedPeer,
    WrongProduct,
)
from obfuscatune.service.adapters import Adapters, AdapterSource
from obfuscatune.service.batch import Group, Prefill, Running, choose
from obfuscatune.service.cache import BatchCache, cells
from obfuscatune.service.engine_limits import EngineLimits, EngineStats
from obfuscatune.service.requests import Handle, Request
from obfuscatune.service.sampling import repetition_penalty
from obfuscatune.training.tokens import context_window, embedding_rows, stop_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Engine", "EngineLimits", "EngineStats"]

log = logging.getLogger(__name__)

_FINAL = (WrongProduct, BudgetExceeded, UntrustedPeer)
"""After one of these the engine stays closed: going on would use a worker that lies, or show more than is allowed."""


class Engine:
    """Answers requests with a model of transformers, many at a time.

    Example:
        >>> with Engine(model, tokenizer) as engine:
        ...     for event in engine.submit(Request(prompt=(1, 2, 3), max_tokens=16)):
        ...         print(event)
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: EngineLimits | None = None,
        adapters: AdapterSource | None = None,
    ) -> None:
        """Start the thread. The model is its from now on, until `close`.

        Args:
            model: a causal language model in evaluation mode, protected or plain, alone or with a provider's adapter.
            tokenizer: the model's.
            limits: on memory and waiting; the defaults where None.
            adapters: has the files of fine-tuned models by name. It is called in the engine's thread.

        Raises:
            ConfigError: a model that cannot be served: with another adapter, or with layers that keep something else
                than keys and values; or a tokenizer without an end-of-sequence token.
        """
        self.limits = limits or EngineLimits()
        self._tokenizer = tokenizer
        self._adapters = Adapters(model, adapters, self.limits.adapters)
        base = self._adapters.base.eval()
        self._config, self._device = base.config, base.device
        BatchCache(self._config)  # refused here rather than at the first request
        self.ends = frozenset(stop_ids(tokenizer, base.generation_config))
        """Tokens that end every answer: the tokenizer's, and those that the model names."""
        self._repetition_penalty = repetition_penalty(base.generation_config)
        self._window = context_window(self._config)
        self._vocabulary = embedding_rows(self._config) or len(tokenizer)
        self._accepts = inspect.signature(base.forward).parameters.keys()

        self._changed = threading.Condition()
        """Guards what follows: the thread's and its callers'."""
        self._queue: deque[Running] = deque()
        self._requests: dict[Handle, Running] = {}
        self._to_unload: set[str] = set()
        self._closed: ObfuscaTuneError | None = None
        """Why no more requests are taken."""
        self._is_stopping = False
        self._stats = EngineStats()

        self._admitted: deque[Running] = deque()
        """The thread's own from here on: sequences whose prompts are to be read."""
        self._prefill: Prefill | None = None
        self._groups: dict[str | None, Group] = {}
        self._thread = threading.Thread(target=self._run, name="obfuscatune-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop | None = None) -> Handle:
        """Ask for an answer. From any thread.

        Args:
            request: what is asked for.
            loop: the event loop in which the handle will be read by `async for`; None for a handle that blocks.

        Raises:
            DataError: the model cannot answer it: tokens that it has not, or more than it takes.
            Overloaded: too many requests wait.
            ServiceClosed: the engine is closed; or the error at which it closed itself.
        """
        request.check(self._vocabulary, self._window)
        if cells(1, request.length) > self.limits.cache_tokens:
            raise DataError(
                f"prompt and answer have up to {request.length} tokens; there is memory for "
                f"{self.limits.cache_tokens} with padding; shorten the prompt or lower max_tokens"
            )
        handle = Handle(self._cancel, loop)
        with self._changed:
            if self._closed is not None:
                raise copy.copy(self._closed)
            if len(self._queue) >= self.limits.queue:
                self._count(refused=1)
                raise Overloaded(f"{self.limits.queue} requests wait already; try again later")
            running = Running(request, handle)
            self._queue.append(running)
            self._requests[handle] = running
            self._count(submitted=1)
            self._changed.notify_all()
        return handle

    def unload(self, adapter: str) -> None:
        """Forget a fine-tuned model, before the next step that does not use it any more. From any thread.

        Requests that run finish; whoever asks for it anew has it read again from the source.
        """
        with self._changed:
            self._to_unload.add(adapter)
            self._changed.notify_all()

    def stats(self) -> EngineStats:
        """What it did, and does. From any thread."""
        with self._changed:
            return replace(
                self._stats,
                queued=len(self._queue),
                running=len(self._requests) - len(self._queue),
                adapters=len(self._adapters),
            )

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._closed is None

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until all were answered, or so long. Returns whether all were.

        `close` ends what is left.
        """
        with self._changed:
            self._closed = self._closed or ServiceClosed("the service is shutting down")
            return self._changed.wait_for(lambda: not self._requests, timeout_s)

    def close(self) -> None:
        """Fail what is not answered yet, and end the thread. The model stays open. Twice is once."""
        with self._changed:
            self._closed = self._closed or ServiceClosed("the service was shut down")
            self._is_stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            running = self._requests.get(handle)
            if running is not None:
                running.cancelled = True
                self._changed.notify_all()

    def _count(self, **more: int) -> None:
        """Add to the statistics; the lock is held."""
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._step()
            reason = self._closed
        except ObfuscaTuneError as error:
            reason = error
        except Exception as error:  # noqa: BLE001  # whatever it is: nobody may wait for an answer for ever
            log.error("the engine stopped: %s", _kind(error))  # noqa: TRY400  # its text may hold what is private
            reason = ServiceClosed("the service stopped at a failure of its own")
        self._shut(reason or ServiceClosed("the service was shut down"))

    def _wait(self) -> bool:
        """Return when there is something to do; False where the thread is to end."""
        with self._changed:
            while not (self._is_stopping or self._requests or self._to_unload):
                self._changed.wait()
            return not self._is_stopping

    def _shut(self, reason: ObfuscaTuneError) -> None:
        with self._changed:
            self._closed, self._is_stopping = reason, True
            left = list(self._requests.values())
            self._queue.clear()
        for running in left:
            running.fail(reason)
        self._settle(left)
        self._admitted.clear()

    def _step(self) -> None:
        """Admit, read a chunk of prompts, choose a token for every running sequence."""
        self._end_early()
        self._admit()
        self._read_prompts()
        for adapter, group in list(self._groups.items()):
            sequences = list(group.sequences)
            with self._failing(sequences):
                logits = self._forward(adapter, group.cache, group.tokens(), all_logits=False)
                choose(sequences, logits[:, -1])
            self._settle(sequences, steps=1, rows=len(sequences))

    def _end_early(self) -> None:
        """End what was cancelled or came to its deadline; unload adapters that nobody uses any more."""
        now = time.monotonic()
        with self._changed:
            for running in self._requests.values():
                if running.cancelled:
                    running.finish("cancelled")
                elif running.deadline_s is not None and now >= running.deadline_s:
                    running.fail(RequestTimeout(f"no answer within {running.request.timeout_s:g} s"))
            ended = [running for running in self._requests.values() if running.finished]
            if ended:
                self._queue = deque(running for running in self._queue if not running.finished)
        if ended:
            self._settle(ended)
        with self._changed:
            unload = self._to_unload - self._used()
            self._to_unload -= unload
        for adapter in unload:
            self._adapters.unload(adapter)

    def _used(self) -> set[str]:
        """Adapters of sequences that were admitted."""
        waiting = [running.request.adapter for running in self._admitted]
        reading = [self._prefill.adapter] if self._prefill is not None else []
        return {adapter for adapter in (*waiting, *reading, *self._groups) if adapter is not None}

    def _admit(self) -> None:
        """Take requests from the queue, in their order, while there is room for the first of them."""
        while True:
            with self._changed:
                if not self._queue or not self._has_room(self._queue[0]):
                    return
                running = self._queue.popleft()
            with self._failing([running]):
                self._adapters.load(running.request.adapter, self._used())
                running.prepare(self._tokenizer, self.ends, self._repetition_penalty, self._device)
                self._admitted.append(running)
            self._settle([running])

    def _has_room(self, running: Running) -> bool:
        admitted = [*self._admitted, *(self._prefill.sequences if self._prefill is not None else ())]
        rows = [sequence for group in self._groups.values() for sequence in group.sequences]
        if len(rows) + len(admitted) >= self.limits.batch:
            return False
        if not self._adapters.has_room(running.request.adapter, self._used()):
            return False
        lengths: dict[str | None, list[int]] = {}
        for sequence in (*rows, *admitted, running):
            lengths.setdefault(sequence.request.adapter, []).append(sequence.request.length)
        needed = sum(
            max(cells(len(each), max(each)), group.cache.cells if (group := self._groups.get(adapter)) else 0)
            for adapter, each in lengths.items()
        )
        return needed <= self.limits.cache_tokens

    def _read_prompts(self) -> None:
        """Read a chunk of the newcomers' prompts; those that were read to their end join their group."""
        self._admitted = deque(running for running in self._admitted if not running.finished)
        if self._prefill is None and self._admitted:
            self._prefill = Prefill(self._next_prompts(), BatchCache(self._config, self._device))
        prefill = self._prefill
        if prefill is None:
            return
        with self._failing(prefill.sequences):
            ids = prefill.chunk(self.limits.prefill_tokens)
            logits = self._forward(prefill.adapter, prefill.cache, ids, all_logits=prefill.tells_prompts)
            prefill.take(logits, ids.shape[1])
        if prefill.is_done and not all(sequence.finished for sequence in prefill.sequences):
            group = self._groups.setdefault(prefill.adapter, Group(BatchCache(self._config, self._device)))
            with self._failing([*prefill.sequences, *group.sequences]):  # a cache that was half moved is no cache
                group.join(prefill)
        read = sum(len(running.request.prompt) for running in prefill.sequences) if prefill.is_done else 0
        self._settle(prefill.sequences, prefills=1, prompt_tokens=read)

    def _next_prompts(self) -> list[Running]:
        """The first newcomer, and others of its adapter, as far as all fit into one chunk."""
        chosen = [self._admitted.popleft()]
        adapter, longest = chosen[0].request.adapter, len(chosen[0].request.prompt)
        for running in list(self._admitted):
            width = max(longest, len(running.request.prompt))
            if running.request.adapter == adapter and (len(chosen) + 1) * width <= self.limits.prefill_tokens:
                longest = width
                chosen.append(running)
                self._admitted.remove(running)
        return chosen

    def _forward(self, adapter: str | None, cache: BatchCache, ids: Tensor, *, all_logits: bool) -> Tensor:
        """Logits (n, t or 1, v) of the tokens `ids` (n, t), which follow what is in the cache."""
        tokens = ids.shape[1]
        self._adapters.use(adapter)
        cache.reserve(tokens)
        inputs: dict[str, Any] = {
            "attention_mask": cache.attention_mask(tokens),
            "position_ids": cache.position_ids(tokens),
            "logits_to_keep": 0 if all_logits else 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self._accepts}
        output = self._adapters.base(
            input_ids=ids.to(self._device), past_key_values=cache, use_cache=True, return_dict=True, **inputs
        )
        cache.advance(tokens)
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def _failing(self, sequences: list[Running]) -> Iterator[None]:
        """Fail these sequences with an error that arises within; after some errors the engine closes."""
        try:
            yield
        except _FINAL:
            raise
        except Exception as error:  # noqa: BLE001  # a failure that we do not know fails these requests alone
            if not isinstance(error, ObfuscaTuneError):
                log.error("requests failed: %s", _kind(error))  # noqa: TRY400  # as above
                error = ServiceError("the service failed to answer; its log says at what")
            for running in sequences:
                running.fail(error)

    def _settle(self, sequences: list[Running], **counts: int) -> None:
        """Let those go that have finished, and add to the statistics."""
        for adapter, group in list(self._groups.items()):
            if all(running.finished for running in group.sequences):
                del self._groups[adapter]
            else:
                group.drop_finished()
        if self._prefill is not None and (
            self._prefill.is_done or all(running.finished for running in self._prefill.sequences)
        ):
            self._prefill = None
        with self._changed:
            for running in sequences:
                if running.outcome is not None and self._requests.pop(running.handle, None) is not None:
                    self._count(completion_tokens=running.tokens, **{running.outcome: 1})
                    self._changed.notify_all()
            held = sum(group.cache.cells for group in self._groups.values())
            self._stats = replace(self._stats, cache_tokens=held)
            self._count(**counts)


def _kind(error: Exception) -> str:
    """An error that is not ours, for the log: its type and where it arose, not its text, which may hold a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return f"{type(error).__name__} at {where}"
