"""PEFT on a protected model: what it offers works exactly, or is refused with a clear error. And the adapter leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig, PeftModel, get_peft_model

from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ProtectionError
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import (
    KEY,
    backward,
    batch,
    copy_of,
    deviation,
    fine_tune,
    largest_deviation,
    protected,
    trained,
    with_lora,
)

exact = pytest.mark.usefixtures("float64_throughout")

LLAMA = ARCHITECTURES["llama-biased"]
EXACT = {
    "subset": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "biases": {"bias": "all"},
    "norms too": {"modules_to_save": ["input_layernorm"]},
    "rank per layer": {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 3}},
}
NEEDS_THE_WEIGHT = {
    "dora": {"use_dora": True, "init_lora_weights": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    """A plain model with biases, in float64. Not to be changed."""
    return LLAMA.build(torch.float64)


@exact
@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("order", ["protect then wrap", "wrap then protect"])
def test_gradients_are_exact(llama: Any, worker: LocalWorker, settings: dict[str, Any], order: str) -> None:
    inputs = batch((9, 4), llama.config.vocab_size)
    expected_loss, expected = backward(with_lora(copy_of(llama), **settings), inputs)
    model = copy_of(llama)
    if order == "wrap then protect":
        model = with_lora(model, **settings)
    with protected(model, worker):
        if order == "protect then wrap":
            model = with_lora(model, **settings)
        loss, found = backward(model, inputs)
    assert deviation(expected_loss, loss) < 1e-9
    assert largest_deviation(expected, found) < 1e-9


@pytest.mark.parametrize("settings", NEEDS_THE_WEIGHT.values(), ids=NEEDS_THE_WEIGHT)
def test_what_needs_the_weight_is_refused(worker: LocalWorker, settings: dict[str, Any]) -> None:
    float32 = LLAMA.build(torch.float32)  # PEFT itself refuses the last two in float64
    with protected(float32, worker) as model, pytest.raises(ProtectionError, match="lies on the worker"):
        with_lora(model, **settings)


def test_dora_put_on_before_is_refused(llama: Any, worker: LocalWorker) -> None:
    model = with_lora(copy_of(llama), **NEEDS_THE_WEIGHT["dora"])
    with pytest.raises(ProtectionError, match="DoRA"), protected(model, worker):
        pass
    model(**batch((4,), llama.config.vocab_size).inputs())  # it is as it was


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safely", [True, False])
def test_merging_is_refused(llama: Any, worker: LocalWorker, merge: str, safely: bool) -> None:
    with protected(copy_of(llama), worker) as model:
        adapted = with_lora(model)
        with pytest.raises(ProtectionError, match="merging"):
            getattr(adapted, merge)(safe_merge=safely)


@exact
def test_two_adapters_and_none(llama: Any, worker: LocalWorker) -> None:
    """Switching adapters on and off is PEFT's own business and goes on working."""
    inputs = batch((6,), llama.config.vocab_size).inputs()

    def outputs(model: PeftModel) -> list[torch.Tensor]:
        torch.manual_seed(2)
        model.add_adapter("other", model.peft_config["default"])
        found = [model(**inputs).logits]
        model.set_adapter("other")
        found.append(model(**inputs).logits)
        with model.disable_adapter():
            found.append(model(**inputs).logits)
        return found

    with torch.random.fork_rng(), torch.no_grad():
        expected = outputs(with_lora(copy_of(llama)))
        with protected(copy_of(llama), worker) as model:
            found = outputs(with_lora(model))
    assert max(map(deviation, expected, found)) < 1e-9
    assert deviation(expected[0], expected[1]) > 1e-3 < deviation(expected[1], expected[2])


@exact
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_batch_of_mixed_adapters(llama: Any, worker: LocalWorker, targets: Any, grad: bool) -> None:
    """PEFT adds each row's adapter in place to the part of the base layer's output that is that row's."""
    inputs = batch((9, 4, 7, 5), llama.config.vocab_size).inputs()
    names = ["other", "__base__", "default", "other"]

    def answers(model: PeftModel) -> list[torch.Tensor]:
        torch.manual_seed(2)
        model.add_adapter("other", model.peft_config["default"])
        model.eval().base_model.set_adapter(["default", "other"])
        with torch.set_grad_enabled(grad):
            logits = model(**inputs, adapter_names=names).logits
        if not grad:
            return [logits]
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with torch.random.fork_rng():
        expected = answers(with_lora(copy_of(llama), target_modules=targets))
        with protected(copy_of(llama), worker) as model:
            found = answers(with_lora(model, target_modules=targets))
    assert len(expected) == len(found) and (len(found) > 1) == grad
    assert max(map(deviation, expected, found)) < 1e-9


@exact
def test_c3a_adds_in_place(llama: Any, worker: LocalWorker) -> None:
    """To the base layer's output. It computes in float32 itself, whatever the model's dtype."""
    inputs = batch((9, 4), llama.config.vocab_size)

    def adapted(model: Any) -> PeftModel:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return get_peft_model(model, C3AConfig(block_size=18, target_modules=["q_proj", "o_proj"]))

    expected_loss, expected = backward(adapted(copy_of(llama)), inputs)
    with protected(copy_of(llama), worker) as model:
        loss, found = backward(adapted(model), inputs)
    assert deviation(expected_loss, loss) < 1e-6
    assert largest_deviation(expected, found) < 1e-6


@exact
def test_saved_adapter_fits_the_plain_model(llama: Any, worker: LocalWorker, tmp_path: Path) -> None:
    inputs = batch((9, 4), llama.config.vocab_size).inputs()
    with protected(copy_of(llama), worker) as model:
        adapted = with_lora(model)
        fine_tune(adapted, llama.config.vocab_size, steps=2)
        adapted.eval().save_pretrained(tmp_path)
        with torch.no_grad():
            inside = adapted(**inputs).logits
    outside = PeftModel.from_pretrained(copy_of(llama), tmp_path)
    assert largest_deviation(trained(adapted), _same_names(adapted, outside)) == 0
    with torch.no_grad():
        assert deviation(outside(**inputs).logits, inside) < 1e-9
        assert deviation(llama(**inputs).logits, inside) > 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert KEY._key not in (tmp_path / "adapter_model.safetensors").read_bytes()


def _same_names(adapted: PeftModel, other: PeftModel) -> dict[str, torch.Tensor]:
    parameters = dict(other.named_parameters())
    return {name: parameters[name] for name in trained(adapted)}
