"""Hugging Face's `Trainer` on a protected PEFT model follows the plain one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType
from peft.utils import load_peft_weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from obfuscatune import RekeyCallback
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ProtectionError
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, fine_tune, largest_deviation, protected, trained, with_lora

LLAMA = ARCHITECTURES["llama"]


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of one length."""
    rows = batch((9,) * count, 97)
    return [{name: tensor[row] for name, tensor in rows.inputs().items()} for row in range(count)]


def losses(model: Any, directory: Path, *callbacks: TrainerCallback, **settings: Any) -> list[float]:
    """What `Trainer` logs, step by step, evaluation last."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=5,
        seed=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(12),
        eval_dataset=examples(4),
        callbacks=list(callbacks),
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*logged, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("callbacks", [(), (RekeyCallback(),)], ids=["by itself", "with the callback"])
@pytest.mark.usefixtures("float64_throughout")
def test_trainer_follows_the_plain_one(
    worker: LocalWorker, tmp_path: Path, callbacks: tuple[TrainerCallback, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "obfuscatune")
    with torch.random.fork_rng():
        reference = with_lora(LLAMA.build(torch.float64), lora_dropout=0.1)
        expected = losses(reference, tmp_path / "plain")
        with protected(LLAMA.build(torch.float64), worker, rekey_every=3) as model:
            adapted = with_lora(model, lora_dropout=0.1)
            found = losses(adapted, tmp_path / "protected", *callbacks)
            assert all(layer.epoch >= 1 for layer in model.protection.offloaded)
            assert model.protection.steps == 5
    assert [record.message for record in caplog.records if "renewed every 3 steps" in record.message] != []
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-8, abs=0)
    assert largest_deviation(trained(reference), trained(adapted)) < 1e-8
    files = {path.name for path in (tmp_path / "protected" / "checkpoint-5").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_trainer_with_processes_that_load_its_data(worker: LocalWorker, tmp_path: Path) -> None:
    """They are forked with the model in their memory, and end while it is in use."""
    with torch.random.fork_rng():
        expected = losses(with_lora(LLAMA.build(torch.float64)), tmp_path / "plain")
        with protected(LLAMA.build(torch.float64), worker) as model:
            found = losses(with_lora(model), tmp_path / "protected", dataloader_num_workers=2)
            assert model.protection.stats.reconnects == 0
    assert found == pytest.approx(expected, rel=1e-8, abs=0)


@pytest.mark.usefixtures("float64_throughout")
def test_a_loop_of_ones_own_renews_too(worker: LocalWorker) -> None:
    """Once a step, however many passes a step accumulates; and evaluation renews nothing."""
    with protected(LLAMA.build(torch.float64), worker, rekey_every=3) as model:
        adapted = with_lora(model)
        inputs = batch((9, 4), 97).inputs()
        with torch.no_grad():
            adapted(**inputs), adapted(**inputs)
        assert model.protection.steps == 0
        found = fine_tune(adapted, 97, steps=5, accumulation=3)
        assert model.protection.steps == 4  # the fifth is noticed by the next pass
        assert all(layer.epoch >= 1 for layer in model.protection.offloaded)
    assert found == pytest.approx(
        fine_tune(with_lora(LLAMA.build(torch.float64)), 97, steps=5, accumulation=3), rel=1e-8
    )


def adapter_added(model: Any) -> Any:
    """By transformers' own method, not PEFT's wrapper."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model.add_adapter(LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model


@pytest.mark.usefixtures("float64_throughout")
def test_add_adapter_is_trained_saved_and_resumed(worker: LocalWorker, tmp_path: Path) -> None:
    """Resumed from the adapter: of a checkpoint without PEFT's wrapper `Trainer` itself cannot go on, plain or not."""

    def resumed(model: Any, directory: Path) -> list[float]:
        model.load_adapter(str(tmp_path / "plain" / "checkpoint-5"), is_trainable=True)
        return losses(model, directory)

    with torch.random.fork_rng():
        reference, again = adapter_added(LLAMA.build(torch.float64)), LLAMA.build(torch.float64)
        expected = losses(reference, tmp_path / "plain"), resumed(again, tmp_path / "plain again")
        with protected(LLAMA.build(torch.float64), worker) as model:
            found = losses(adapter_added(model), tmp_path / "protected")
            model.save_pretrained(tmp_path / "saved")
        with protected(LLAMA.build(torch.float64), worker) as model:
            found_again = resumed(model, tmp_path / "protected again")
            model.save_pretrained(tmp_path / "saved again")
    assert found == pytest.approx(expected[0], rel=1e-8, abs=0)
    assert found_again == pytest.approx(expected[1], rel=1e-8, abs=0)
    assert max(found_again) < max(found)
    for name, trained_here in (("", reference), (" again", again)):
        plain, checkpoint = (tmp_path / f"{kind}{name}" / "checkpoint-5" for kind in ("plain", "protected"))
        assert {path.name for path in checkpoint.iterdir()} == {path.name for path in plain.iterdir()}
        for directory in (checkpoint, tmp_path / f"saved{name}"):
            assert largest_deviation(load_peft_weights(str(plain)), load_peft_weights(str(directory))) < 1e-8
        outside = LLAMA.build(torch.float64)
        outside.load_adapter(str(tmp_path / f"saved{name}"))
        assert largest_deviation(_factors(trained_here), _factors(outside)) < 1e-8


def _factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("unfrozen", [False, True])
def test_trainer_without_an_adapter_is_refused_before_a_step(
    worker: LocalWorker, tmp_path: Path, unfrozen: bool
) -> None:
    with protected(LLAMA.build(torch.float32), worker) as model:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_(unfrozen)
        with pytest.raises(ProtectionError, match="without an adapter cannot be trained"):
            losses(model, tmp_path)
        assert model.protection.stats.crossings == 0
        with pytest.raises(ProtectionError, match="cannot be saved"):
            model.save_pretrained(tmp_path)


def test_training_that_comes_to_nothing_is_warned_of_once(worker: LocalWorker) -> None:
    inputs = batch((9, 4), 97).inputs()
    with protected(LLAMA.build(torch.float32), worker) as model:
        with pytest.warns(UserWarning, match="nothing of this protected model is trainable"):
            assert model.train() is model
        assert model.train().training and not model.eval().training
        model.train().requires_grad_()
        with pytest.warns(UserWarning, match="refuse to save"):
            model(**inputs)
        model(**inputs)


@pytest.mark.parametrize("order", ["protect then wrap", "wrap then protect", "add_adapter"])
def test_parameters_are_counted_as_of_the_plain_model(worker: LocalWorker, order: str) -> None:
    def counted(model: Any, adapted: Any) -> list[object]:
        base = [model.num_parameters(exclude_embeddings=e, only_trainable=t) for e in (0, 1) for t in (0, 1)]
        return [*base, adapted.get_nb_trainable_parameters() if adapted is not model else None]

    def adapt(model: Any) -> Any:
        return adapter_added(model) if order == "add_adapter" else with_lora(model, task_type=TaskType.CAUSAL_LM)

    plain = LLAMA.build(torch.float32)
    expected = [plain.num_parameters(), *counted(plain, adapt(plain))]
    model = LLAMA.build(torch.float32)
    if order == "wrap then protect":
        adapted = adapt(model)
        with protected(adapted, worker):
            assert counted(model, adapted) == expected[1:]
        return
    with protected(model, worker):
        assert [model.num_parameters(), *counted(model, adapt(model))] == expected
