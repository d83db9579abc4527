"""Hugging Face's `Trainer` on a protected PEFT model follows the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from obfuscatune import RekeyCallback
from obfuscatune.enclave.local import LocalWorker
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, largest_deviation, protected, trained, with_lora

LLAMA = ARCHITECTURES["llama"]


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of one length."""
    rows = batch((9,) * count, 97)
    return [{name: tensor[row] for name, tensor in rows.inputs().items()} for row in range(count)]


def losses(model: Any, directory: Path, **settings: Any) -> list[float]:
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
        callbacks=[RekeyCallback()],
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*logged, trainer.evaluate()["eval_loss"]]


@pytest.mark.usefixtures("float64_throughout")
def test_trainer_follows_the_plain_one(worker: LocalWorker, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        reference = with_lora(LLAMA.build(torch.float64), lora_dropout=0.1)
        expected = losses(reference, tmp_path / "plain")
        with protected(LLAMA.build(torch.float64), worker, rekey_every=3) as model:
            adapted = with_lora(model, lora_dropout=0.1)
            found = losses(adapted, tmp_path / "protected")
            assert all(layer.epoch >= 1 for layer in model.protection.offloaded)
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
