"""The work that is timed, the same for every contender: a LoRA step, a forward pass, or tokens one by one."""

from __future__ import annotations

from typing import Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from obfuscatune.tuning.adapter import without_peft_warnings
from obfuscatune.tuning.elsewhere import after_step, moved_optimizer

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RATE = 1e-4
SEED = 0
NEW_TOKENS = 16
"""Tokens that one timed call of `Decode` adds to each stream."""


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of that shape with random float32 weights, the same for every process."""
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


class LoraStep:
    """Forward, backward and AdamW on one fixed random batch, as plain PEFT does them."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        torch.manual_seed(SEED)
        with without_peft_warnings():
            self._model = get_peft_model(model, LoraConfig(**LORA)).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        moved = moved_optimizer(self._model, lr=RATE, weight_decay=0.01)
        self._optimizer = moved or torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
        self._ids = _random_ids(model, batch, length)

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self) -> float:
        """One step; returns the loss in nats."""
        loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        after_step(self._model)
        return float(loss.detach())


class Forward:
    """A forward pass over one fixed random batch, without gradients or adapter."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self._model, self._ids = model.eval(), _random_ids(model, batch, length)

    def prepare(self) -> None:
        """Nothing."""

    @torch.inference_mode()
    def __call__(self) -> float:
        """One pass; returns the mean logit of the last positions."""
        return float(self._model(input_ids=self._ids).logits[:, -1].mean())


class Decode:
    """`NEW_TOKENS` steps of one token for each of `batch` streams, after a prompt of `length` tokens, with a cache.

    The tokens are given and random, so that rounding cannot send two contenders along different texts.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self._model = model.eval()
        self._prompt = _random_ids(model, batch, length)
        self._tokens = _random_ids(model, batch, NEW_TOKENS)
        self._cache = DynamicCache()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Read the prompt; not timed."""
        self._cache = DynamicCache()
        self._model(input_ids=self._prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Decode; returns the mean logit after the last token."""
        for column in self._tokens.split(1, dim=1):
            logits = self._model(input_ids=column, past_key_values=self._cache, use_cache=True).logits
        return float(logits.mean())


class Workload(Protocol):
    """What a contender does when it is told to."""

    def prepare(self) -> None:
        """What comes before and is not timed."""

    def __call__(self) -> float:
        """The work; returns a number that is the same for every contender, but for rounding."""


WORKLOADS: dict[str, type[LoraStep] | type[Forward] | type[Decode]] = {
    "step": LoraStep,
    "forward": Forward,
    "decode": Decode,
}


def _random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    torch.manual_seed(SEED)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, length))
