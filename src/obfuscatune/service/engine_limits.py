"""What an engine may use, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obfuscatune.errors import ConfigError
from obfuscatune.service.cache import bytes_per_token

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may use.

    Attributes:
        batch: sequences that run at a time.
        cache_tokens: places for a token in all caches, padding included. One set of prompts that is being read, of
            `prefill_tokens` or one prompt, has its own beside.
        queue: requests that wait to run; one more is refused.
        prefill_tokens: tokens of prompts that are read in one step.
        adapters: fine-tuned models in memory at a time.

    Raises:
        ConfigError: one is below 1.
    """

    batch: int = 16
    cache_tokens: int = 65_536
    queue: int = 256
    prefill_tokens: int = 256
    adapters: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")

    def within(self, memory_bytes: int, config: PretrainedConfig, dtype: torch.dtype) -> EngineLimits:
        """The same with as many `cache_tokens` as fit into some memory."""
        return replace(self, cache_tokens=max(1, memory_bytes // bytes_per_token(config, dtype)))


@dataclass(frozen=True)
class EngineStats:
    """What an engine did since it was made, and does now. Nothing of it depends on what is in a request.

    Attributes:
        submitted: requests that were taken; `refused` were not, for want of a place in the queue.
        finished: answers that came to their end; `cancelled` and `failed` did not.
        prompt_tokens: that were read; `completion_tokens` were chosen, in answers that have ended.
        steps: forward passes for one token each; `rows` is the sum of their batch sizes, so that `rows / steps` is how
            many requests shared one. `prefills` is the number of those for prompts.
        queued: requests that wait now; `running` are being answered.
        cache_tokens: places for a token in the caches now.
        adapters: in memory now.
    """

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    rows: int = 0
    prefills: int = 0
    queued: int = 0
    running: int = 0
    cache_tokens: int = 0
    adapters: int = 0
