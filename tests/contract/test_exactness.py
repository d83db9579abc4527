"""Protected against plain, for every architecture, in float64: the same numbers.

Tolerances: 1e-9 relative for one pass, 1e-8 after ten steps. Measured is about 1e-14: a layer costs three or four more
roundings of 1e-16 per element, and ten steps of Adam divide small gradients by their own size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import (
    backward,
    batch,
    copy_of,
    deviation,
    fine_tune,
    greedy,
    largest_deviation,
    protected,
    trained,
    with_lora,
)

pytestmark = pytest.mark.usefixtures("float64_throughout")

ONE_PASS = 1e-9
TEN_STEPS = 1e-8
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
generates = pytest.mark.parametrize("architecture", CAUSAL, indirect=True)
LENGTHS = {"one sequence": (13,), "one token": (1,), "ragged": (13, 4, 9)}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@torch.no_grad()
def test_logits_and_loss(plain: Any, shielded: Any, lengths: tuple[int, ...]) -> None:
    inputs = batch(lengths, plain.config.vocab_size)
    expected, found = plain(**inputs.inputs()), shielded(**inputs.inputs())
    assert deviation(inputs.attended(expected.logits), inputs.attended(found.logits)) < ONE_PASS
    if max(lengths) > 1:  # a causal model predicts nothing from one token, and its loss is the mean of none
        assert deviation(expected.loss, found.loss) < ONE_PASS


def every_lora_gradient(architecture: Architecture, plain: Any, worker: LocalWorker, order: str, mode: str) -> None:
    inputs = batch((13, 4), plain.config.vocab_size)
    reference = with_lora(copy_of(plain), architecture, lora_dropout=0.1).train(mode == "train")
    expected_loss, expected = backward(reference, inputs)
    model = copy_of(plain)
    if order == "wrap then protect":
        model = with_lora(model, architecture, lora_dropout=0.1)
    with protected(model, worker):
        if order == "protect then wrap":
            model = with_lora(model, architecture, lora_dropout=0.1)
        loss, found = backward(model.train(mode == "train"), inputs)
    assert all(gradient.abs().max() > 1e-9 for gradient in expected.values())
    assert deviation(expected_loss, loss) < ONE_PASS
    assert largest_deviation(expected, found) < ONE_PASS


@pytest.mark.parametrize(("order", "mode"), [("protect then wrap", "train"), ("wrap then protect", "eval")])
def test_every_lora_gradient(
    architecture: Architecture, plain: Any, worker: LocalWorker, order: str, mode: str
) -> None:
    every_lora_gradient(architecture, plain, worker, order, mode)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize(("order", "mode"), [("protect then wrap", "eval"), ("wrap then protect", "train")])
def test_every_lora_gradient_in_the_other_mode(
    architecture: Architecture, plain: Any, worker: LocalWorker, order: str, mode: str
) -> None:
    """Which takes no other way for other layers."""
    every_lora_gradient(architecture, plain, worker, order, mode)


def test_ten_steps_of_adamw(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    vocabulary = plain.config.vocab_size
    reference = with_lora(copy_of(plain), architecture, lora_dropout=0.1)
    before = trained(reference)
    expected = fine_tune(reference, vocabulary, steps=10)
    with protected(copy_of(plain), worker) as model:
        model = with_lora(model, architecture, lora_dropout=0.1)
        found = fine_tune(model, vocabulary, steps=10)
    assert largest_deviation(before, trained(reference)) > 1e-2
    assert found == pytest.approx(expected, rel=TEN_STEPS, abs=0)
    assert largest_deviation(trained(reference), trained(model)) < TEN_STEPS


@generates
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_generation(plain: Any, shielded: Any, use_cache: bool) -> None:
    prompt = batch((6,), plain.config.vocab_size)
    expected = greedy(plain, prompt, tokens=40, use_cache=use_cache)
    assert torch.equal(greedy(shielded, prompt, tokens=40, use_cache=use_cache), expected)
    assert expected.shape == (1, 46)


@generates
def test_greedy_generation_of_prompts_padded_on_the_left(plain: Any, shielded: Any) -> None:
    right = batch((6, 2, 4), plain.config.vocab_size)
    left = type(right)(*(tensor.flip(1) for tensor in (right.input_ids, right.attention_mask, right.labels)))
    assert torch.equal(greedy(shielded, left, tokens=12), greedy(plain, left, tokens=12))


@torch.no_grad()
def test_crossings(architecture: Architecture, plain: Any, shielded: Any) -> None:
    """As many requests as a block has different inputs to its linear layers: no more, no fewer."""
    before = shielded.protection.stats.snapshot()
    shielded(**batch((5,), plain.config.vocab_size).inputs())
    blocks = plain.config.num_hidden_layers
    assert shielded.protection.stats.since(before).crossings == architecture.crossings * blocks
