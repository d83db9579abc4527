"""Other dtypes, other transforms, other ways to run: the same model comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.placeholder_tensors import LazyProduct
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import backward, batch, copy_of, deviation, largest_deviation, protected, with_lora

LLAMA = ARCHITECTURES["llama"]

# Relative to the largest logit. float32: 24 bits, some ten roundings deep. bfloat16: 8 bits, so that each layer
# rounds by 0.4 % in any case, and the two runs round differently; plain bfloat16 is as far from plain float64.
DTYPES = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 1e-1)}

# Rounding of 1e-16 is amplified by at most the condition number per layer: kappa = 1 for orthogonal transforms, 32
# by choice, and for a Gaussian matrix of 48 x 48 some hundreds. `exact` leaves the same margin over measurement.
TRANSFORMS = {
    "structured": 1e-12,
    "haar": 1e-12,
    "conditioned(32)": 1e-10,
    "gaussian": 1e-8,
    "identity": 1e-12,
}


@pytest.mark.parametrize("name", DTYPES)
@torch.no_grad()
def test_logits_in_lower_precision(architecture: Architecture, worker: LocalWorker, name: str) -> None:
    dtype, tolerance = DTYPES[name]
    plain = architecture.build(dtype)
    inputs = batch((13, 4, 9), plain.config.vocab_size)
    expected = inputs.attended(plain(**inputs.inputs()).logits)
    with protected(plain, worker) as model:
        found = inputs.attended(model(**inputs.inputs()).logits)
    assert deviation(expected, found) < tolerance


@pytest.mark.parametrize(("transform", "tolerance"), TRANSFORMS.items())
@pytest.mark.usefixtures("float64_throughout")
def test_every_transform(worker: LocalWorker, transform: str, tolerance: float) -> None:
    inputs = batch((9, 4), 97)
    expected_loss, expected = backward(with_lora(LLAMA.build(torch.float64)), inputs)
    with protected(LLAMA.build(torch.float64), worker, transform=transform, allow_unsafe=True) as model:
        loss, found = backward(with_lora(model), inputs)
    assert deviation(expected_loss, loss) < tolerance
    assert largest_deviation(expected, found) < tolerance


KNOBS: dict[str, dict[str, Any]] = {
    "first block in the enclave": {"first_blocks": 1},
    "no shield rows": {"shield_rows": 0, "allow_unsafe": True},
    "many shield rows": {"shield_rows": 300},
    "no mixing": {"mixing": False, "allow_unsafe": True},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
@pytest.mark.usefixtures("float64_throughout")
def test_every_knob(worker: LocalWorker, knobs: dict[str, Any]) -> None:
    inputs = batch((9, 4), 97)
    expected_loss, expected = backward(with_lora(LLAMA.build(torch.float64)), inputs)
    with protected(LLAMA.build(torch.float64), worker, **knobs) as model:
        loss, found = backward(with_lora(model), inputs)
        crossings = model.protection.stats.crossings
    assert deviation(expected_loss, loss) < 1e-9
    assert largest_deviation(expected, found) < 1e-9
    offloaded_blocks = 2 - knobs.get("first_blocks", 0)
    assert crossings == 2 * LLAMA.crossings * offloaded_blocks - _first_needs_no_gradient(knobs)


def _first_needs_no_gradient(knobs: dict[str, Any]) -> int:
    """The gradient with regard to the embeddings is not asked for where they feed the first crossing directly."""
    return 0 if knobs.get("first_blocks") else 1


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the worker had cores of its own: the enclave works on while it multiplies. And it did."""
    awaited: list[torch.Size] = []

    def noted(shape: torch.Size, *rest: Any) -> LazyProduct:
        awaited.append(shape)
        return LazyProduct(shape, *rest)

    monkeypatch.setattr(WorkerClient, "computes_apart", True)
    monkeypatch.setattr("obfuscatune.enclave.layers.LazyProduct", noted)
    yield
    assert awaited


@pytest.mark.usefixtures("float64_throughout", "apart")
def test_working_on_meanwhile(architecture: Architecture, worker: LocalWorker) -> None:
    inputs = batch((9, 4), 97)
    expected_loss, expected = backward(
        with_lora(architecture.build(torch.float64), architecture, lora_dropout=0.1).train(), inputs
    )
    with protected(architecture.build(torch.float64), worker) as model:
        loss, found = backward(with_lora(model, architecture, lora_dropout=0.1).train(), inputs)
    assert deviation(expected_loss, loss) < 1e-9
    assert largest_deviation(expected, found) < 1e-9


@pytest.mark.parametrize("meanwhile", [False, True], ids=["waiting", "working on"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.usefixtures("float64_throughout")
def test_gradient_checkpointing(
    worker: LocalWorker, name: str, reentrant: bool, meanwhile: bool, request: pytest.FixtureRequest
) -> None:
    if meanwhile:
        request.getfixturevalue("apart")
    chosen = ARCHITECTURES[name]
    inputs = batch((9, 4), 97)
    expected_loss, expected = backward(with_lora(chosen.build(torch.float64), chosen, lora_dropout=0.1).train(), inputs)
    with protected(chosen.build(torch.float64), worker) as model:
        adapted = with_lora(model, chosen, lora_dropout=0.1).train()
        adapted.enable_input_require_grads()
        adapted.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss, found = backward(adapted, inputs)
        crossings = model.protection.stats.crossings
    assert crossings > 2 * chosen.crossings * 2  # something was computed twice
    assert deviation(expected_loss, loss) < 1e-9
    assert largest_deviation(expected, found) < 1e-9


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.usefixtures("float64_throughout")
def test_under_every_grad_mode(worker: LocalWorker, context: Any, attention: str) -> None:
    plain = LLAMA.build(torch.float64, attn_implementation=attention)
    inputs = batch((9, 4), 97).inputs()
    with protected(copy_of(plain), worker) as model, context():
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-9
        assert model.protection.stats.crossings == LLAMA.crossings * 2
