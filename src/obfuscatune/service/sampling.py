"""Logits -> a token and log-probabilities, as `generate` of transformers draws them.

    logits  ->  float32  ->  the model's repetition penalty  ->  bias, penalties of the request
            ->  / temperature  ->  top-p  ->  softmax  ->  one draw

The draws come from a generator of the request's own, which gives the numbers that `torch.manual_seed` would give: a
request has the same tokens alone and beside others.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from obfuscatune.errors import ConfigError, DataError

GREEDY_BELOW = 1e-5
"""A temperature under this takes the likeliest token: so near to 0, division would overflow."""
HOTTEST = 1e4
"""The highest temperature; there all tokens are equally likely to seven digits."""
LARGEST_BIAS = 100.0
LARGEST_PENALTY = 2.0
MOST_BIASES = 1024
MOST_LOGPROBS = 20
"""Limits of OpenAI's API."""
_NOT_APPLIED: dict[str, int | None] = {
    "num_beams": 1,
    "guidance_scale": 1,
    "typical_p": 1,
    "encoder_repetition_penalty": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "min_p": 0,
    "top_h": None,
    "min_new_tokens": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
"""Settings by which a model's generation config changes what `generate` draws, and the values that change nothing."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: draws from the likeliest tokens of this share.
        seed: of the draws, a signed 64-bit integer; None draws one.
        logit_bias: added to the logits of these tokens, -100 to 100.
        presence_penalty: subtracted from the logit of each token that was written already, -2 to 2.
        frequency_penalty: the same, once for each time that it was written.

    Raises:
        DataError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        _refuse_unless(0 <= self.temperature <= HOTTEST, "temperature", f"0 to {HOTTEST:g}")
        _refuse_unless(0 < self.top_p <= 1, "top_p", "more than 0, up to 1")
        _refuse_unless(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a signed integer of 64 bits")
        for name in ("presence_penalty", "frequency_penalty"):
            _refuse_unless(abs(getattr(self, name)) <= LARGEST_PENALTY, name, "-2 to 2")
        _refuse_unless(len(self.logit_bias) <= MOST_BIASES, "logit_bias", f"up to {MOST_BIASES} tokens")
        _refuse_unless(
            all(abs(bias) <= LARGEST_BIAS for bias in self.logit_bias.values()), "logit_bias", "values of -100 to 100"
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before the temperature is applied."""
        return bool(self.logit_bias) or bool(self.presence_penalty) or bool(self.frequency_penalty)


def repetition_penalty(generation_config: Any) -> float:
    """What a model's generation config says; 1 for none. The rest of it that matters must be as if it said nothing.

    Raises:
        ConfigError: it has `generate` draw in a way that is not drawn here.
    """
    for name, neutral in _NOT_APPLIED.items():
        value = getattr(generation_config, name, None)
        if value is not None and value != neutral:
            raise ConfigError(f"the model's generation_config.json sets {name}, which is not served: take it out")
    return float(getattr(generation_config, "repetition_penalty", None) or 1)


def _refuse_unless(holds: bool, name: str, expected: str) -> None:
    if not holds:  # the value is not repeated: it is the client's
        raise DataError(f"{name}: expected {expected}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of a text, of the model's own logits: no bias, penalty or temperature is in them.

    Attributes:
        token: that stands there.
        logprob: its own; None for the first token of a prompt, which nothing precedes.
        top: the likeliest tokens there and theirs, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one answer, one after another. It counts what it chose."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        repetition_penalty: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            params: how tokens are chosen.
            prompt: what is written on.
            repetition_penalty: of the model's generation config; logits of tokens in prompt and answer are divided by
                it, or multiplied where they are negative.
            device: of the logits.
        """
        self.params = params
        self._generator = torch.Generator(device)
        self._generator.manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
        self._top_p: Any = None if params.top_p == 1 else TopPLogitsWarper(params.top_p)
        self._repetition_penalty = repetition_penalty
        self._seen = set(prompt) if repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token.

        Args:
            logits: (v,), of the position that it follows.
            likeliest: their argmax, which the caller has of all rows at once.
        """
        token = self._drawn(logits, likeliest)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _drawn(self, logits: Tensor, likeliest: int) -> int:
        params = self.params
        changes = params.changes_logits or self._repetition_penalty != 1
        if params.is_greedy and not changes:
            return likeliest
        scores = logits[None].to(torch.float32, copy=True)  # (1, v), as generate has it
        if changes:
            self._change(scores[0])
        if params.is_greedy:
            return int(scores.argmax(dim=-1))
        if params.temperature != 1:
            scores = scores / params.temperature
        if self._top_p is not None:
            scores = self._top_p(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator))

    def _change(self, scores: Tensor) -> None:
        """Apply penalties and bias to (v,)."""
        if self._repetition_penalty != 1:
            where = torch.tensor(sorted(self._seen), device=scores.device)
            seen = scores[where]
            scores[where] = torch.where(seen < 0, seen * self._repetition_penalty, seen / self._repetition_penalty)
        changes = dict(self.params.logit_bias)
        if self.params.presence_penalty or self.params.frequency_penalty:
            for token, count in self._counts.items():
                penalty = self.params.presence_penalty + count * self.params.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            where = torch.tensor(list(changes), device=scores.device)
            scores[where] += torch.tensor(list(changes.values()), device=scores.device)


def token_logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """Of one position: of the token that stands there, and the `top` likeliest.

    Args:
        logits: (v,), of the position before.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(top, logprobs.shape[0]))
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
