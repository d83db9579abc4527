"""Model shapes that have a name. Weights are random: time does not depend on what a model knows."""

from __future__ import annotations

from pathlib import Path

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from obfuscatune.enclave.config import read_config
from obfuscatune.wire.errors import ConfigError, ModelFileError

_GPT2 = {  # width, heads, layers
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 16, 24),
    "gpt2-large": (1280, 20, 36),
    "gpt2-xl": (1600, 25, 48),
}

NAMES = (*_GPT2, "llama-3.2-1b", "llama-3-8b")


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a named shape, or of a config.json or directory; with fewer layers where asked.

    Raises:
        ConfigError: neither a known name nor a configuration.
    """
    config = _named(shape) or _from_path(shape)
    if layers is not None:
        config.num_hidden_layers = layers  # GPT2Config maps this to n_layer
    return config


def shape_name(shape: str) -> str:
    """What a shape is called in results: its name, or that of the folder or file with its configuration."""
    path = Path(shape)
    return shape if shape in NAMES else path.parent.name if path.name == "config.json" else path.name


def _named(shape: str) -> PretrainedConfig | None:
    if shape in _GPT2:
        width, heads, depth = _GPT2[shape]
        return GPT2Config(n_embd=width, n_head=heads, n_layer=depth)
    if shape == "llama-3.2-1b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
    if shape == "llama-3-8b":
        return LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        )  # fmt: skip
    return None


def _from_path(path: str) -> PretrainedConfig:
    if not Path(path).exists():
        raise ConfigError(f"unknown shape {path!r}; known are {', '.join(NAMES)}, or the path of a config.json")
    try:
        return read_config(Path(path))
    except ModelFileError as error:
        raise ConfigError(f"{path} is not a model configuration: {error}") from error
