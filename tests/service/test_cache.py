"""A cache of sequences that come and go holds for each what a cache of its own would hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig

from obfuscatune.errors import ConfigError
from obfuscatune.service.cache import SLACK, BatchCache, cells

HEADS, DIM, WINDOW = 2, 3, 5
SHAPE = {"num_hidden_layers": 2, "hidden_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
FULL, SLIDING = LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=WINDOW)


def states(owner: int, position: int) -> torch.Tensor:
    """Keys of one token of one sequence, which nobody else has."""
    return torch.full((HEADS, 1, DIM), owner + position / 1000)


def write(cache: BatchCache, owners: list[int], done: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward pass of so many tokens of each sequence; returns keys and mask as the last layer sees them."""
    cache.reserve(tokens)
    mask, positions = cache.attention_mask(tokens), cache.position_ids(tokens)
    assert mask.sum(1).tolist() == [count + tokens for count in done]
    assert positions[:, -1].tolist() == [count + tokens - 1 for count in done]
    new = torch.stack(
        [
            torch.cat([states(owner, count + t) for t in range(tokens)], 1)
            for owner, count in zip(owners, done, strict=True)
        ]
    )
    length, offset = cache.get_mask_sizes(tokens, 0)
    for layer in range(2):
        keys, values = cache.update(new, -new, layer)
        assert torch.equal(keys, -values)
    cache.advance(tokens)
    assert keys.shape[2] == length
    return keys, mask[:, offset : offset + length]


def check(keys: torch.Tensor, mask: torch.Tensor, owners: list[int], done: list[int], window: int | None) -> None:
    """Each sequence sees its own tokens, in their order, and zeros before."""
    for row, (owner, count) in enumerate(zip(owners, done, strict=True)):
        seen = keys[row][:, mask[row].bool()]
        first = 0 if window is None else max(0, count - window)
        assert torch.equal(seen, torch.cat([states(owner, t) for t in range(first, count)], 1))
        assert torch.isfinite(keys[row]).all()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.lists(st.integers(1, 90), min_size=1, max_size=3)),
        st.tuples(st.just("remove"), st.integers(0, 7)),
        st.tuples(st.just("step"), st.integers(1, 40)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(steps=STEPS, sliding=st.booleans())
def test_sequences_come_and_go(steps: list[tuple[str, list[int] | int]], sliding: bool) -> None:
    config, window = (SLIDING, WINDOW) if sliding else (FULL, None)
    cache, number = BatchCache(config), 0
    owners: list[int] = []
    done: list[int] = []
    for kind, argument in steps:
        if kind == "join" and isinstance(argument, list):
            prompt = BatchCache(config)
            prompt.begin(argument, max(argument))
            newcomers = list(range(number, number + len(argument)))
            padded = torch.stack(
                [
                    torch.cat([states(owner, t - max(argument) + length) for t in range(max(argument))], 1)
                    for owner, length in zip(newcomers, argument, strict=True)
                ]
            )
            for layer in range(2):
                prompt.update(padded, -padded, layer)
            prompt.advance(max(argument))
            cache.join(prompt, range(len(argument)), [200] * len(argument))
            owners, done, number = owners + newcomers, done + argument, number + len(argument)
        elif kind == "remove" and isinstance(argument, int) and argument < len(owners) > 1:
            cache.remove(argument)
            for values in (owners, done):
                values[argument] = values[-1]
                values.pop()
        elif kind == "step" and isinstance(argument, int) and owners:
            for _ in range(min(argument, 200 - max(done))):
                keys, mask = write(cache, owners, done, 1)
                done = [count + 1 for count in done]
                check(keys, mask, owners, done, window)
        assert cache.cells <= 4 * cells(max(1, len(owners)), 200)


def test_a_prompt_in_chunks_is_the_prompt_at_once() -> None:
    for config, window in ((FULL, None), (SLIDING, WINDOW)):
        cache = BatchCache(config)
        cache.begin([9, 9], 9)
        write(cache, [1, 2], [0, 0], 4)
        keys, mask = write(cache, [1, 2], [4, 4], 5)
        first = 0 if window is None else 9 - 5 - window + 1
        assert torch.equal(keys[1], torch.cat([states(2, t) for t in range(first, 9)], 1))
        assert mask.all()


def test_what_leaves_is_zeroed() -> None:
    """A sequence that was poisoned by NaN, and its owner's text, stay in nobody's memory."""
    cache, prompt = BatchCache(FULL), BatchCache(FULL)
    prompt.begin([3, 3], 3)
    poison = torch.full((2, HEADS, 3, DIM), float("nan"))
    poison[0] = 1
    for layer in range(2):
        prompt.update(poison, poison, layer)
    prompt.advance(3)
    cache.join(prompt, [0, 1], [9, 9])
    cache.remove(1)
    for layer in cache.layers:
        assert torch.isfinite(layer.keys).all()
        assert layer.keys[1].abs().sum() == 0


def test_memory_is_bounded_by_what_was_announced() -> None:
    cache, prompt = BatchCache(FULL), BatchCache(FULL)
    prompt.begin([10], 10)
    new = torch.zeros(1, HEADS, 10, DIM)
    for layer in range(2):
        prompt.update(new, new, layer)
    prompt.advance(10)
    for _ in range(5):
        cache.join(prompt, [0], [100])
    for step in range(90):
        write(cache, list(range(5)), [10 + step] * 5, 1)
        assert cache.cells <= cells(5, 100) == 8 * (100 + SLACK)
    for _ in range(4):
        cache.remove(0)
    assert cache.cells <= 2 * (100 + SLACK)


def test_models_with_other_layers_are_refused() -> None:
    hybrid = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="cannot be served"):
        BatchCache(hybrid)
