"""Tokens are drawn as `generate` draws them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from obfuscatune.errors import DataError
from obfuscatune.service.sampling import Sampler, SamplingParams, token_logprobs

V = 31


def logits_of(seed: int, steps: int = 12) -> torch.Tensor:
    """(steps, v)."""
    return 3 * torch.randn(steps, V, generator=torch.Generator().manual_seed(seed))


def drawn(sampler: Sampler, logits: torch.Tensor) -> list[int]:
    """A token from each row."""
    return [sampler.choose(row, int(row.argmax())) for row in logits]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.floats(0.01, 1.0),
    repetition=st.sampled_from([1.0, 1.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_as_the_processors_of_transformers_and_the_global_generator(
    seed: int, temperature: float, top_p: float, repetition: float, dtype: torch.dtype
) -> None:
    logits, prompt = logits_of(seed % 1000).to(dtype), [3, 5]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition)] if repetition != 1 else [])
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = list(prompt)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for row in logits:
            scores = processors(torch.tensor([expected]), row[None].to(torch.float32, copy=True))
            expected.append(int(torch.multinomial(scores.softmax(-1), 1)))
    before = torch.random.get_rng_state()
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=top_p, seed=seed), prompt, repetition)
    assert drawn(sampler, logits) == expected[2:]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bias_and_penalties_change_the_logits_before_all_else() -> None:
    row = torch.zeros(V)
    row[4], row[5], row[6] = 3.0, 2.5, 2.0
    greedy: dict[str, Any] = {"temperature": 0}
    rows = row.expand(5, V)
    assert drawn(Sampler(SamplingParams(**greedy)), rows) == [4] * 5
    assert drawn(Sampler(SamplingParams(**greedy, logit_bias={9: 100.0})), rows) == [9] * 5
    assert drawn(Sampler(SamplingParams(**greedy, logit_bias={4: -100.0})), rows) == [5] * 5
    # 4 costs 0.6 once it was chosen, however often: then 5 is the largest, then both are below 6 by nothing more.
    assert drawn(Sampler(SamplingParams(**greedy, presence_penalty=0.6)), rows) == [4, 5, 4, 4, 4]
    # 4 costs 0.4 for each time: 3, 2.6 | 2.5, 2.2 | ...
    assert drawn(Sampler(SamplingParams(**greedy, frequency_penalty=0.4)), rows) == [4, 4, 5, 4, 5]
    assert torch.equal(row[4:7], torch.tensor([3.0, 2.5, 2.0]))  # what the caller has is not changed


def test_without_a_seed_each_request_has_its_own() -> None:
    logits = torch.zeros(40, V)
    assert drawn(Sampler(SamplingParams()), logits) != drawn(Sampler(SamplingParams()), logits)


def test_a_temperature_next_to_nothing_takes_the_likeliest() -> None:
    logits = logits_of(1)
    assert drawn(Sampler(SamplingParams(temperature=1e-300)), logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"logit_bias": {3: 101.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused_and_not_repeated(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(DataError, match=f"^{name}: expected [^n]") as refused:
        SamplingParams(**settings)
    assert "101" not in str(refused.value)


def test_log_probabilities() -> None:
    row = logits_of(2)[0]
    told = token_logprobs(row, 7, 3)
    assert told.token == 7
    assert told.logprob == pytest.approx(float(row.log_softmax(-1)[7]))
    assert [token for token, _ in told.top] == row.topk(3).indices.tolist()
    assert token_logprobs(row, 7, 0).top == ()
    assert len(token_logprobs(row[:5], 3, 20).top) == 5
