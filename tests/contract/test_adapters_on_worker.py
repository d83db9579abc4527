"""LoRA on the worker against plain PEFT, for every architecture, in float64.

SGD takes the same path in every rotated basis, so its factors must be plain PEFT's: 1e-9 relative after ten steps,
measured is about 1e-14. AdamW takes another one; `scripts/measure_adapters.py` says how far it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, ProtectionError
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import backward, batch, copy_of, deviation, largest_deviation, protected, with_lora

pytestmark = pytest.mark.usefixtures("float64_throughout")

LLAMA = ARCHITECTURES["llama"]
LR = 5e-3


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer, by PEFT's names; fetched where they are elsewhere."""
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def take_step(model: Any, optimizer: Any, vocabulary: int, *, steps: int = 10, rekey_after: int = 0) -> list[float]:
    """Two passes accumulated for each step; every loss."""
    model.train()
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(3)  # GPT-2 drops units of its own
        for step in range(1, steps + 1):
            for part in range(2):
                loss = model(**batch((9, 5), vocabulary, seed=10 * step + part).inputs()).loss / 2
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if step == rekey_after:
                model.protection.rekey()
    return losses


def plain_sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, **settings)


def ten_steps_of_sgd(architecture: Architecture, plain: Any, worker: LocalWorker, rekey_after: int) -> None:
    vocabulary = plain.config.vocab_size
    reference = with_lora(copy_of(plain), architecture)
    before = factors(reference)
    expected = take_step(reference, plain_sgd(reference), vocabulary)
    with protected(copy_of(plain), worker, profile="paper") as model:
        adapted = with_lora(model, architecture)
        optimizer = model.protection.move_adapter(adapted).optimizer("sgd", lr=LR)
        found = take_step(adapted, optimizer, vocabulary, rekey_after=rekey_after)
        moved = factors(adapted)
    assert largest_deviation(before, factors(reference)) > 1e-3
    assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert largest_deviation(factors(reference), moved) < 1e-9


def test_ten_steps_of_sgd(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    """Four under one key, and six under another."""
    ten_steps_of_sgd(architecture, plain, worker, rekey_after=4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"], indirect=True)
def test_ten_steps_of_sgd_under_one_key(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    ten_steps_of_sgd(architecture, plain, worker, rekey_after=0)


def test_logits_and_switching_off(architecture: Architecture, plain: Any, worker: LocalWorker) -> None:
    inputs = batch((13, 4), plain.config.vocab_size)
    reference = with_lora(copy_of(plain), architecture).eval()
    with torch.no_grad(), protected(copy_of(plain), worker, profile="paper") as model:
        adapted = with_lora(model, architecture).eval()
        model.protection.move_adapter(adapted)
        expected = inputs.attended(reference(**inputs.inputs()).logits)
        assert deviation(expected, inputs.attended(adapted(**inputs.inputs()).logits)) < 1e-9
        with adapted.disable_adapter():
            found = inputs.attended(adapted(**inputs.inputs()).logits)
        without = inputs.attended(plain(**inputs.inputs()).logits)
        assert deviation(without, found) < 1e-9
        assert deviation(expected, without) > 1e-3


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"clip": 1e-3}], ids=str)
def test_settings_of_sgd(worker: LocalWorker, settings: dict[str, float]) -> None:
    reference = with_lora(LLAMA.build(torch.float64))
    sgd = plain_sgd(reference, weight_decay=settings.get("weight_decay", 0.0))
    if "clip" in settings:
        parameters = sgd.param_groups[0]["params"]
        sgd.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(parameters, settings["clip"]) and None)
    expected = take_step(reference, sgd, 97, steps=3)
    with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = with_lora(model)
        found = take_step(
            adapted, model.protection.move_adapter(adapted).optimizer("sgd", lr=LR, **settings), 97, steps=3
        )
        assert largest_deviation(factors(reference), factors(adapted)) < 1e-9
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_adamw_where_nothing_is_rotated(worker: LocalWorker) -> None:
    """The worker's AdamW is PyTorch's; only the basis makes its path another."""
    reference = with_lora(LLAMA.build(torch.float64))
    settings = {"lr": LR, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    adamw = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], **settings)
    expected = take_step(reference, adamw, 97)
    with protected(
        LLAMA.build(torch.float64), worker, profile="paper", transform="identity", allow_unsafe=True
    ) as model:
        adapted = with_lora(model)
        optimizer = model.protection.move_adapter(adapted).optimizer("adamw", **settings)
        found = take_step(adapted, optimizer, 97)
        assert largest_deviation(factors(reference), factors(adapted)) < 1e-9
        optimizer.fetch_state()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                theirs = adamw.state[dict(reference.named_parameters())[name]]
                assert largest_deviation(dict(theirs), optimizer.state[parameter]) < 1e-9
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_state_fetched_and_stored_is_the_same_run(worker: LocalWorker) -> None:
    """Under one key, and where nothing is rotated, a checkpoint changes nothing."""
    results = []
    for interrupted in (False, True):
        with protected(
            LLAMA.build(torch.float64), worker, profile="paper", transform="identity", allow_unsafe=True
        ) as model:
            adapted = with_lora(model)
            optimizer = model.protection.move_adapter(adapted).optimizer("adamw", lr=LR)
            take_step(adapted, optimizer, 97, steps=2)
            if interrupted:
                saved, moments = factors(adapted), optimizer.state_dict()
                take_step(adapted, optimizer, 97, steps=2)
                adapted.load_state_dict(saved, strict=False)
                optimizer.load_state_dict(moments)
            results.append(take_step(adapted, optimizer, 97, steps=2))
    assert results[0] == pytest.approx(results[1], rel=1e-12, abs=0)


def test_first_moments_are_carried_exactly(worker: LocalWorker) -> None:
    with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = with_lora(model)
        optimizer = model.protection.move_adapter(adapted).optimizer("adamw", lr=LR)
        take_step(adapted, optimizer, 97, steps=2)
        seen = []
        for _ in range(2):
            optimizer.fetch_state()
            seen.append({str(i): state["exp_avg"].clone() for i, state in enumerate(optimizer.state.values())})
            squares = [state["exp_avg_sq"].sum() for state in optimizer.state.values()]
            model.protection.rekey()
        assert largest_deviation(seen[0], seen[1]) < 1e-9
        optimizer.fetch_state()
        for before, state in zip(squares, optimizer.state.values(), strict=True):  # a rotation keeps their sum
            assert deviation(before, state["exp_avg_sq"].sum()) < 1e-9
            assert (state["exp_avg_sq"] >= 0).all()


def test_the_saved_adapter_is_peft_s_own(worker: LocalWorker, tmp_path: Path) -> None:
    inputs = batch((9, 4), 97).inputs()
    plain = LLAMA.build(torch.float64)
    with protected(copy_of(plain), worker, profile="paper") as model:
        adapted = with_lora(model)
        optimizer = model.protection.move_adapter(adapted).optimizer("adamw", lr=LR)
        take_step(adapted, optimizer, 97, steps=3)
        adapted.eval().save_pretrained(tmp_path)
        with torch.no_grad():
            inside = adapted(**inputs).logits
    outside = PeftModel.from_pretrained(copy_of(plain), tmp_path)
    with torch.no_grad():
        assert deviation(outside(**inputs).logits, inside) < 1e-9
        assert deviation(plain(**inputs).logits, inside) > 1e-3


def test_a_saved_adapter_is_moved_too(worker: LocalWorker, tmp_path: Path) -> None:
    inputs = batch((9, 4), 97).inputs()
    plain = with_lora(LLAMA.build(torch.float64)).eval()
    plain.save_pretrained(tmp_path)
    with torch.no_grad(), protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = PeftModel.from_pretrained(model, tmp_path).eval()
        model.protection.move_adapter(adapted)
        assert deviation(plain(**inputs).logits, adapted(**inputs).logits) < 1e-9


def test_protecting_a_wrapped_model_moves_its_adapter(worker: LocalWorker) -> None:
    inputs = batch((9, 4), 97)
    reference = with_lora(LLAMA.build(torch.float64))
    expected, _ = backward(reference, inputs)
    with protected(with_lora(LLAMA.build(torch.float64)), worker, profile="paper") as adapted:
        assert adapted.protection.adapters is not None
        assert not [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert deviation(expected, backward(adapted, inputs)[0]) < 1e-9


def test_dropout_is_the_worker_s(worker: LocalWorker) -> None:
    """Another draw each time in training, whatever the enclave's seed; none in evaluation. And unbiased."""
    inputs = batch((9, 4), 97).inputs()
    with torch.no_grad(), protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = with_lora(model, lora_dropout=0.4)
        model.protection.move_adapter(adapted)
        draws = []
        for _ in range(60):
            torch.manual_seed(1)
            draws.append(adapted.train()(**inputs).logits)
        still = [adapted.eval()(**inputs).logits for _ in range(2)]
    assert deviation(draws[0], draws[1]) > 1e-6
    assert torch.equal(still[0], still[1])
    mean = torch.stack(draws).mean(0)
    assert deviation(still[0], mean) < 0.5 * max(deviation(still[0], draw) for draw in draws)


def test_trainer(worker: LocalWorker, tmp_path: Path) -> None:
    rows = batch((9,) * 12, 97)
    data = [{name: tensor[row] for name, tensor in rows.inputs().items()} for row in range(12)]

    def losses(model: Any, optimizer: Any, folder: Path) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=LR,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=4,
            max_grad_norm=0.0,
            seed=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with torch.random.fork_rng():
        reference = with_lora(LLAMA.build(torch.float64))
        expected = losses(reference, plain_sgd(reference), tmp_path / "plain")
        with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
            adapted = with_lora(model)
            optimizer = model.protection.move_adapter(adapted).optimizer("sgd", lr=LR)
            found = losses(adapted, optimizer, tmp_path / "moved")
            assert largest_deviation(factors(reference), factors(adapted)) < 1e-8
    assert len(expected) == 4
    assert found == pytest.approx(expected, rel=1e-8, abs=0)


def test_what_cannot_be_moved(worker: LocalWorker) -> None:
    with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        with pytest.raises(ProtectionError, match=r"no protected layer .* has a LoRA adapter"):
            model.protection.move_adapter(model)
        adapted = with_lora(model)
        adapted.add_adapter("other", adapted.peft_config["default"])
        with pytest.raises(ProtectionError, match=r"has the adapters \['default', 'other'\]"):
            model.protection.move_adapter(adapted)
    with protected(LLAMA.build(torch.float64), worker) as model, pytest.raises(ConfigError, match="in the enclave"):
        model.protection.move_adapter(with_lora(model))


def test_gradient_checkpointing_is_refused(worker: LocalWorker) -> None:
    with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = with_lora(model)
        adapted.enable_input_require_grads()
        adapted.activation_checkpointing_enable({"use_reentrant": False})
        with pytest.raises(ProtectionError, match="gradient checkpointing"):
            model.protection.move_adapter(adapted)


def test_an_optimizer_in_the_enclave_is_not_silently_useless(worker: LocalWorker) -> None:
    with protected(LLAMA.build(torch.float64), worker, profile="paper") as model:
        adapted = with_lora(model)
        model.protection.move_adapter(adapted)
        with pytest.raises(ValueError, match="empty parameter list"):
            plain_sgd(adapted)
