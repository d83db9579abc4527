"""The timed work: a LoRA step, a forward pass, or decoding. Every process that is compared does the same.

The models have random weights of a named shape: the time does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.protection import Masking
from obfuscatune.errors import ConfigError, ModelFileError
from obfuscatune.training.adapter import after_step, without_peft_warnings
from obfuscatune.training.loop import make_optimizer

_GPT2 = {  # width, heads, layers
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 16, 24),
    "gpt2-large": (1280, 20, 36),
    "gpt2-xl": (1600, 25, 48),
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NAMES = (*_GPT2, "llama-3.2-1b", "llama-3.1-8b", "qwen3-moe")
"""The known shapes."""
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA_BESIDE_EXPERTS = LORA | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
"""PEFT has no dropout for stacks of experts, and `protect` none of their factors."""
ALL_AHEAD = Masking(memory_bytes=8 << 30)
"""Room for masks that are all drawn before what is timed."""
RATE = 1e-4
SEED = 0
NEW_TOKENS = 16
"""Tokens that one timed call of `Decode` adds to each sequence."""


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a shape.

    Args:
        shape: one of `NAMES`, or the path of a config.json or of its directory.
        layers: depth of the model; None for the shape's own.

    Raises:
        ConfigError: `shape` is neither a known name nor a configuration.
    """
    config = _named(shape) or _from_path(shape)
    if layers is not None:
        config.num_hidden_layers = layers  # GPT2Config maps this to n_layer
    return config


def shape_name(shape: str) -> str:
    """The name of a shape in results: for a path the name of the model's folder, without the rest of the path."""
    if shape in NAMES:
        return shape
    path = Path(shape)
    return path.parent.name if path.name == "config.json" else path.name


def _named(shape: str) -> PretrainedConfig | None:
    if shape in _GPT2:
        width, heads, depth = _GPT2[shape]
        return GPT2Config(n_embd=width, n_head=heads, n_layer=depth)
    if shape == "llama-3.2-1b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE | {"factor": 32.0},
        )  # fmt: skip
    if shape == "llama-3.1-8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
            max_position_embeddings=131072, rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE | {"factor": 8.0},
        )  # fmt: skip
    if shape == "qwen3-moe":  # Qwen3-30B-A3B
        return Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
            max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
    return None


def _from_path(path: str) -> PretrainedConfig:
    if not Path(path).exists():
        raise ConfigError(f"unknown shape {path!r}; known are {', '.join(NAMES)}, or the path of a config.json")
    try:
        return read_config(Path(path))
    except ModelFileError as error:
        raise ConfigError(f"{path} is not a model configuration: {error}") from error


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model with random float32 weights, the same in every process. Sets torch's global seed."""
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def lora_of(config: PretrainedConfig) -> LoraConfig:
    """The adapter that a step trains: on all linear layers, of a mixture of experts on those of attention."""
    return LoraConfig(**(LORA_BESIDE_EXPERTS if getattr(config, "num_experts", None) else LORA))


class Workload:
    """Work that is timed, on a fixed random batch. Made of a model, a batch size and a length in tokens."""

    requests_alike = 1
    """Requests of one call that have the same layer, direction and number of rows."""

    def prepare(self) -> None:
        """Do what comes before each call and is not timed."""

    def __call__(self) -> float:
        """Do the work. Returns a number that is equal in all processes up to rounding."""
        raise NotImplementedError


class LoraStep(Workload):
    """Forward, backward and AdamW, as plain PEFT does them."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        torch.manual_seed(SEED)
        with without_peft_warnings():
            self._model = get_peft_model(model, lora_of(model.config)).train()
        self._optimizer = make_optimizer(self._model, lr=RATE, weight_decay=0.01)
        self._ids = _random_ids(model, batch, length)

    def __call__(self) -> float:
        """One step; returns the loss in nats."""
        loss = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        after_step(self._model)
        return float(loss.detach())


class Forward(Workload):
    """A forward pass without gradients and without adapter."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self._model, self._ids = model.eval(), _random_ids(model, batch, length)

    @torch.inference_mode()
    def __call__(self) -> float:
        """One pass; returns the mean logit of the last positions."""
        return float(self._model(input_ids=self._ids).logits[:, -1].mean())


class Decode(Workload):
    """`NEW_TOKENS` decoding steps for `batch` sequences, after a prompt of `length` tokens, with a key-value cache.

    The new tokens are fixed and random, not sampled: so rounding cannot make two processes decode different texts.
    """

    requests_alike = NEW_TOKENS

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self._model = model.eval()
        self._prompt = _random_ids(model, batch, length)
        self._tokens = _random_ids(model, batch, NEW_TOKENS)
        self._cache = DynamicCache()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Fill the cache with the prompt."""
        self._cache = DynamicCache()
        self._model(input_ids=self._prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Decode; returns the mean logit after the last token."""
        for column in self._tokens.split(1, dim=1):
            logits = self._model(input_ids=column, past_key_values=self._cache, use_cache=True).logits
        return float(logits.mean())


WORKLOADS: dict[str, Callable[[PreTrainedModel, int, int], Workload]] = {
    "step": LoraStep,
    "forward": Forward,
    "decode": Decode,
}


def _random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Token ids (batch, length), int64, on the model's device, the same in every process."""
    torch.manual_seed(SEED)
    return torch.randint(model.config.get_text_config().vocab_size, (batch, length)).to(model.device)
