"""A model small enough for every test, and records to train it on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WINDOW = 64


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|end|>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.fixture
def model() -> GPT2LMHeadModel:
    """Two layers of width 16 with random weights, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=WINDOW, vocab_size=257, bos_token_id=256, eos_token_id=256
        )
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or raw bytes, to a file of its own."""
    made = 0

    def write(*lines: dict[str, Any] | bytes) -> Path:
        nonlocal made
        made += 1
        path = tmp_path / f"records-{made}.jsonl"
        path.write_bytes(
            b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
        )
        return path

    return write
