"""Sequences that run together: their prompts are read, their tokens chosen, the finished ones leave.

newcomers  ->  Prefill: their prompts, in chunks, padded on the left     (a cache of its own)
           ->  first tokens  ->  Group: those of one adapter, a token each a step
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from obfuscatune.errors import NonFiniteError, ObfuscaTuneError
from obfuscatune.service.cache import BatchCache
from obfuscatune.service.requests import Event, FinishEvent, FinishReason, Handle, PromptEvent, Request, TokenEvent
from obfuscatune.service.sampling import Sampler, TokenLogprobs, token_logprobs
from obfuscatune.service.text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_LOGPROBS_AT_ONCE = 64
"""Tokens in a chunk of prompts whose log-probabilities are asked for: each has logits of the whole vocabulary."""


class Running:
    """A request, from `submit` to its end."""

    def __init__(self, request: Request, handle: Handle) -> None:
        self.request = request
        self.handle = handle
        self.deadline_s = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self.cancelled = False
        self.outcome: Literal["finished", "cancelled", "failed"] | None = None
        """None while it is answered."""
        self.tokens = 0
        """Chosen so far."""
        self.last = 0
        """The token that was chosen last."""
        self._sampler: Sampler
        self._text: AnswerText
        self._ends: frozenset[int]
        self._prompt_logprobs: list[TokenLogprobs] = []

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], repetition_penalty: float, device: torch.device
    ) -> None:
        """Make what choosing tokens takes; the request is about to run."""
        request = self.request
        self._sampler = Sampler(request.sampling, request.prompt, repetition_penalty, device)
        self._text = AnswerText(tokenizer, request.prompt, request.stop)
        self._ends = ends | frozenset(request.stop_ids)

    @property
    def finished(self) -> bool:
        """Whether its last event was delivered."""
        return self.outcome is not None

    def choose(self, logits: Tensor, likeliest: int) -> None:
        """Choose and deliver the next token; `finished` tells whether it is the last.

        Args:
            logits: (v,), of the position before.
            likeliest: their argmax.
        """
        request = self.request
        if request.max_tokens == 0:
            self.finish("length")
            return
        token = self._sampler.choose(logits, likeliest)
        self.tokens += 1
        self.last = token
        if token in self._ends:
            self.finish("stop")
            return
        text = self._text.add(token)
        logprobs = None if request.logprobs is None else token_logprobs(logits, token, request.logprobs)
        self._deliver(TokenEvent(token, text, logprobs))
        if self._text.stopped:
            self.finish("stop")
        elif self.tokens == request.max_tokens:
            self.finish("length")

    def add_prompt_logprobs(self, logits: Tensor, position: int) -> None:
        """Keep the log-probabilities of the prompt's tokens that follow some positions.

        Args:
            logits: (t, v), of the positions from `position` on; those before the prompt's first token are negative.
        """
        prompt, top = self.request.prompt, self.request.logprobs or 0
        if position <= 0 and not self._prompt_logprobs:
            self._prompt_logprobs.append(TokenLogprobs(prompt[0], None, ()))
        for row in range(max(0, -position), logits.shape[0]):
            following = position + row + 1
            if following < len(prompt):
                self._prompt_logprobs.append(token_logprobs(logits[row], prompt[following], top))

    def deliver_prompt_logprobs(self) -> None:
        """Deliver them, where they were asked for."""
        if self.request.prompt_logprobs and not self.finished:
            self._deliver(PromptEvent(tuple(self._prompt_logprobs)))

    def finish(self, reason: FinishReason) -> None:
        """End the answer, with the text that was held back, where a token was chosen."""
        text = self._text.rest() if self.tokens else ""
        if reason == "length" and self.tokens and self._text.stopped:
            reason = "stop"  # what was held back had a stop string in it
        self._deliver(FinishEvent(reason, text, len(self.request.prompt), self.tokens))
        self.outcome = "cancelled" if reason == "cancelled" else "finished"

    def fail(self, error: ObfuscaTuneError) -> None:
        """End the request with an error. Each request gets its own: it is raised in whichever thread waits for it."""
        if not self.finished:
            self._deliver(copy.copy(error))
            self.outcome = "failed"

    def _deliver(self, event: Event | ObfuscaTuneError) -> None:
        self.handle.deliver(event)


def choose(sequences: list[Running], logits: Tensor) -> None:
    """Choose the next token of each sequence that has not finished.

    Args:
        logits: (n, v), of the last position of each.
    """
    likeliest = logits.float().argmax(dim=-1, keepdim=True)
    largest = logits.gather(-1, likeliest)  # NaN is the largest number to argmax
    for row, sequence in enumerate(sequences):
        if sequence.finished:
            continue
        if not math.isfinite(largest[row]):
            sequence.fail(NonFiniteError("the model's logits are not finite numbers"))
        else:
            sequence.choose(logits[row], int(likeliest[row]))


@dataclass
class Group:
    """The sequences of one adapter, each in its row of the cache."""

    cache: BatchCache
    sequences: list[Running] = field(default_factory=list)

    def tokens(self) -> Tensor:
        """(n, 1): what each sequence goes on from."""
        return torch.tensor([[sequence.last] for sequence in self.sequences])

    def drop_finished(self) -> None:
        """Let those go that have finished."""
        for row in reversed(range(len(self.sequences))):
            if self.sequences[row].finished:
                self.cache.remove(row)
                self.sequences[row] = self.sequences[-1]
                self.sequences.pop()

    def join(self, prefill: Prefill) -> None:
        """Take those in whose prompts were read."""
        rows = [row for row, sequence in enumerate(prefill.sequences) if not sequence.finished]
        if rows:
            newcomers = [prefill.sequences[row] for row in rows]
            self.cache.join(prefill.cache, rows, [sequence.request.length for sequence in newcomers])
            self.sequences += newcomers


class Prefill:
    """Prompts that are being read, of one adapter."""

    def __init__(self, sequences: list[Running], cache: BatchCache) -> None:
        self.sequences = sequences
        self.cache = cache
        self.adapter = sequences[0].request.adapter
        prompts = [sequence.request.prompt for sequence in sequences]
        self._width = max(len(prompt) for prompt in prompts)
        self._read = 0
        """Columns that were read."""
        # Padding is masked, and nothing reads what comes of it. The first token stands there, for want of another.
        padded = [prompt[:1] * (self._width - len(prompt)) + prompt for prompt in prompts]
        self._ids = torch.tensor(padded)  # (n, width)
        cache.begin([len(prompt) for prompt in prompts], self._width)

    @property
    def tells_prompts(self) -> bool:
        """Whether the logits of all positions are needed."""
        return any(sequence.request.prompt_logprobs for sequence in self.sequences)

    @property
    def is_done(self) -> bool:
        """Whether all prompts were read."""
        return self._read == self._width

    def chunk(self, most: int) -> Tensor:
        """(n, t): the tokens of the next forward pass, at most so many in all, but one of each at the least."""
        if self.tells_prompts:
            most = min(most, _PROMPT_LOGPROBS_AT_ONCE)
        tokens = max(1, most // len(self.sequences))
        return self._ids[:, self._read : self._read + tokens]

    def take(self, logits: Tensor, tokens: int) -> None:
        """Take up a forward pass of so many tokens of each.

        Args:
            logits: (n, tokens, v); of the last token alone, unless `tells_prompts`.
        """
        for row, sequence in enumerate(self.sequences):
            if sequence.request.prompt_logprobs:
                padding = self._width - len(sequence.request.prompt)
                sequence.add_prompt_logprobs(logits[row], self._read - padding)
        self._read += tokens
        if self.is_done:
            for sequence in self.sequences:
                sequence.deliver_prompt_logprobs()
            choose(self.sequences, logits[:, -1])
