"""TRL's trainers with their default arguments (bf16, gradient checkpointing) on a protected model, beside plain.

Installed by the extra `trl`; `make test-extras` runs this.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import obfuscatune
from obfuscatune.enclave.local_worker import LocalWorker

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="the extra trl is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*"),
]

ROUNDING = {("SFT", True): 0.02, ("DPO", True): 0.06, ("SFT", False): 1e-4, ("DPO", False): 1e-4}
"""How far a loss may be off, by trainer and whether in bfloat16. There each layer's output is rounded by 0.4 %, and the
two runs round differently: plain DPO's losses in bfloat16 are up to 0.05 off its own in float32 on this data, and up to
0.025 off those of the same model with weights changed by 0.1 %."""
STORIES = [
    f"Once upon a time, there was a girl named {name}. She liked to play" for name in ("Lily", "Mia", "Ann", "Eve")
]
PAIRS = [{"prompt": story, "chosen": " in the park.", "rejected": " xylophone of."} for story in STORIES]


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def with_lora(model: Any) -> PeftModel:
    """Fresh factors, on top of a provider's adapter where the model has one."""
    if not isinstance(model, PeftModel):
        return get_peft_model(model, lora())
    model.add_adapter("default", lora())
    return model


def losses(kind: str, model: Any, source: Path, directory: Path, wrapped: bool, bf16: bool) -> list[float]:
    """What the trainer logs in three steps, everything but output, pace and, if asked, bf16 left at its default."""
    import trl
    from datasets import Dataset

    examples = [{"text": story} for story in STORIES] if kind == "SFT" else PAIRS
    pace = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-4}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    if not bf16:
        quiet["bf16"] = False
    args = getattr(trl, f"{kind}Config")(str(directory), **pace, **quiet)
    assert args.bf16 == bf16 and args.gradient_checkpointing
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if wrapped:
            model = with_lora(model)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=None if wrapped else lora(),
        )
        trainer.train()
    assert (directory / "checkpoint-3" / "adapter_model.safetensors").is_file()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.parametrize("bf16", [True, False], ids=["default", "float32"])
def test_losses_are_those_of_plain(
    worker: LocalWorker, stories260k: Path, tmp_path: Path, kind: str, wrapped: bool, bf16: bool
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(stories260k)
    expected = losses(kind, plain, stories260k, tmp_path / "plain", wrapped, bf16)
    model = obfuscatune.load(stories260k, worker.address)
    try:
        found = losses(kind, model, stories260k, tmp_path / "protected", wrapped, bf16)
    finally:
        model.protection.close()
    assert len(expected) == 3
    assert found == pytest.approx(expected, abs=ROUNDING[kind, bf16])


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_losses_on_top_of_a_provider_are_those_on_top_of_a_merged_one(
    worker: LocalWorker, stories260k: Path, tmp_path: Path, kind: str
) -> None:
    """DPO's reference, for which TRL disables the adapter, is the provider's model and not the base."""
    plain = AutoModelForCausalLM.from_pretrained(stories260k)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2, lora_alpha=1)
        provider = get_peft_model(plain, config)
    provider.save_pretrained(tmp_path / "provider")
    expected = losses(kind, provider.merge_and_unload(), stories260k, tmp_path / "plain", True, False)
    model = obfuscatune.load(stories260k, worker.address)
    try:
        stacked = obfuscatune.load_provider_adapter(model, tmp_path / "provider")
        found = losses(kind, stacked, stories260k, tmp_path / "protected", True, False)
    finally:
        model.protection.close()
    assert found == pytest.approx(expected, abs=ROUNDING[kind, False])
    assert not (tmp_path / "protected" / "checkpoint-3" / "provider").exists()
