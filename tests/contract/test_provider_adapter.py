"""A provider's adapter under the owner's, held against plain PEFT with the same two adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import obfuscatune
from obfuscatune import load_provider_adapter
from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError, ProtectionError
from tests.contract.architectures import ARCHITECTURES
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

exact = pytest.mark.usefixtures("float64_throughout")
OWNER: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "init_lora_weights": False}
PROVIDERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rslora": {"use_rslora": True},
    "rank per layer": {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"up_proj": 3}},
    "other layers": {"target_modules": ["q_proj", "v_proj"]},
}
BOUNDS = {"private": (1e-9, 1e-9, 1e-9), "guarded": (1e-5, 6e-5, 1e-5)}
"""Of logits, gradients and the losses of ten steps, as in test_exactness.py and test_guarded.py."""


def embedded() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float64).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: ARCHITECTURES["llama"].build(torch.float64),
    "tiny-gpt2": embedded,
}


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest) -> Any:
    """A plain model in float64. Not to be changed."""
    return MODELS[request.param]()


def provider_of(model: Any, folder: Path, **settings: Any) -> Path:
    """A provider's adapter for the model, trained elsewhere, in PEFT's format."""
    with_lora(copy_of(model), seed=5, **settings).save_pretrained(str(folder))
    return folder


def reference(model: Any, provider: Path, **settings: Any) -> PeftModel:
    """Plain PEFT with both adapters: nothing of ours. The provider's is frozen."""
    both = PeftModel.from_pretrained(copy_of(model), str(provider), adapter_name="provider")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        both.add_adapter("default", LoraConfig(**{**OWNER, **settings}, task_type="CAUSAL_LM"))
    both.base_model.set_adapter(["default", "provider"])
    for name, parameter in both.named_parameters():
        parameter.requires_grad_(".default." in name)
    return both.eval()


def stacked(model: Any, provider: Path, **settings: Any) -> Any:
    """The same by `load_provider_adapter`, on a model that may be protected."""
    both = load_provider_adapter(model, provider)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        both.add_adapter("default", LoraConfig(**{**OWNER, **settings}, task_type="CAUSAL_LM"))
    return both


@exact
@pytest.mark.parametrize("profile", BOUNDS)
@pytest.mark.parametrize("first_blocks", [0, 1])
def test_logits_gradients_and_ten_steps(
    plain: Any, worker: LocalWorker, mask_worker: LocalWorker, tmp_path: Path, profile: str, first_blocks: int
) -> None:
    kind = {"fan_in_fan_out": True} if plain.config.model_type == "gpt2" else {}
    provider = provider_of(plain, tmp_path, **kind)
    expected = reference(plain, provider, **kind)
    of_logits, of_gradients, of_losses = BOUNDS[profile]
    inputs, vocabulary = batch((9, 4), plain.config.vocab_size), plain.config.vocab_size
    masks = {"mask_worker": mask_worker.address} if profile == "guarded" else {}
    with protected(copy_of(plain), worker, profile=profile, first_blocks=first_blocks, **masks) as model:
        found = stacked(model, provider, **kind)
        with torch.no_grad():
            with_both = expected(**inputs.inputs()).logits
            assert deviation(with_both, found(**inputs.inputs()).logits) < of_logits
            for without in ("default", "provider"):  # each of the two counts
                expected.base_model.set_adapter(without)
                assert deviation(with_both, expected(**inputs.inputs()).logits) > 1e-3
            expected.base_model.set_adapter(["default", "provider"])
            for name, parameter in expected.named_parameters():
                parameter.requires_grad_(".default." in name)
        _, gradients = backward(expected, inputs)
        _, ours = backward(found, inputs)
        assert all(".default." in name for name in ours)
        assert largest_deviation(gradients, ours) < of_gradients
        expected.zero_grad()
        found.zero_grad()
        losses = fine_tune(expected, vocabulary, steps=10)
        assert fine_tune(found, vocabulary, steps=10) == pytest.approx(losses, rel=of_losses, abs=0)
        if profile == "private":
            assert largest_deviation(trained(expected), trained(found)) < 1e-6
    kept = load_file(provider / "adapter_model.safetensors")
    after = {name.replace(".provider.", "."): p for name, p in found.named_parameters() if ".provider." in name}
    assert len(kept) == len(after) and all(torch.equal(kept[name], p.detach()) for name, p in after.items())


@exact
@pytest.mark.parametrize("settings", PROVIDERS.values(), ids=PROVIDERS)
def test_kinds_of_lora_that_add_up(worker: LocalWorker, tmp_path: Path, settings: dict[str, Any]) -> None:
    llama = MODELS["llama"]()
    provider, inputs = provider_of(llama, tmp_path, **settings), batch((9, 4), llama.config.vocab_size)
    owner = {"target_modules": ["down_proj", "q_proj"], "use_rslora": True}
    _, expected = backward(reference(llama, provider, **owner), inputs)
    with protected(copy_of(llama), worker) as model:
        _, found = backward(stacked(model, provider, **owner), inputs)
    assert largest_deviation(expected, found) < 1e-9


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True, "init_lora_weights": True},
    "modules_to_save": {"modules_to_save": ["input_layernorm"]},
    "bias=all": {"bias": "all"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_add_up_is_refused(tmp_path: Path, setting: str) -> None:
    """As the provider's and as the owner's, and the model is as it was."""
    llama = ARCHITECTURES["llama-biased"].build(torch.float32)
    bad = provider_of(llama, tmp_path / "bad", **REFUSED[setting])
    with pytest.raises(ConfigError, match=f"{setting} does not add up"):
        load_provider_adapter(llama, bad)
    model = load_provider_adapter(llama, provider_of(llama, tmp_path / "good"))
    with pytest.raises(ConfigError, match=f"adapter default: {setting} does not add up"):
        model.add_adapter("default", LoraConfig(**{**OWNER, **REFUSED[setting]}))
    assert list(model.peft_config) == ["provider"]


def test_lora_on_the_worker_is_refused(worker: LocalWorker, tmp_path: Path) -> None:
    """In either order, before anything of the adapter is sent."""
    llama = ARCHITECTURES["llama"].build(torch.float32)
    provider = provider_of(llama, tmp_path)
    with (
        protected(copy_of(llama), worker, profile="paper") as model,
        pytest.raises(ConfigError, match="would show the worker the provider's adapter"),
    ):
        load_provider_adapter(model, provider)
    model = load_provider_adapter(copy_of(llama), provider)
    with pytest.raises(ConfigError, match="would show the worker the provider's adapter"):
        obfuscatune.protect(model, worker.address, "paper")
    model(**batch((4,), llama.config.vocab_size).inputs())  # it is as it was


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    llama = ARCHITECTURES["llama"].build(torch.float32)
    with pytest.raises(ConfigError, match="goes under a causal language model, not a LlamaModel"):
        load_provider_adapter(llama.model, provider_of(llama, tmp_path))


@exact
def test_wrap_then_protect(worker: LocalWorker, tmp_path: Path) -> None:
    llama = MODELS["llama"]()
    provider, inputs = provider_of(llama, tmp_path), batch((9, 4), llama.config.vocab_size)
    _, expected = backward(reference(llama, provider), inputs)
    with protected(stacked(copy_of(llama), provider), worker) as model:
        _, found = backward(model, inputs)
        assert largest_deviation(expected, found) < 1e-9
        with pytest.raises(ProtectionError, match="merging"):
            model.merge_and_unload()


@exact
def test_the_provider_stays_active_and_frozen(worker: LocalWorker, tmp_path: Path) -> None:
    llama = MODELS["llama"]()
    provider, inputs = provider_of(llama, tmp_path), batch((6,), llama.config.vocab_size)
    alone = PeftModel.from_pretrained(copy_of(llama), str(provider)).eval()
    with protected(copy_of(llama), worker) as model, torch.no_grad():
        found = stacked(model, provider)
        both = found(**inputs.inputs()).logits
        with found.disable_adapter():
            assert deviation(alone(**inputs.inputs()).logits, found(**inputs.inputs()).logits) < 1e-9
        found.add_adapter("other", LoraConfig(**OWNER))
        assert deviation(both, found(**inputs.inputs()).logits) < 1e-9, "a second one of the owner's waits to be set"
        found.set_adapter("other")
        assert found.active_adapters == ["other", "provider"]
        assert deviation(both, found(**inputs.inputs()).logits) > 1e-3
        found.set_adapter("default")
        assert deviation(both, found(**inputs.inputs()).logits) < 1e-9
        assert torch.equal(greedy(found, inputs, tokens=5), greedy(reference(llama, provider), inputs, tokens=5))
    assert {name.split(".")[-2] for name, p in found.named_parameters() if p.requires_grad} == {"default"}


def test_what_is_saved_is_the_owners_alone(tmp_path: Path) -> None:
    llama = ARCHITECTURES["llama"].build(torch.float32)
    provider = provider_of(llama, tmp_path / "provider")
    model = load_provider_adapter(copy_of(llama), provider)
    with pytest.raises(ConfigError, match="no adapter of the owner's"):
        model.save_pretrained(str(tmp_path / "none"))
    model.add_adapter("default", LoraConfig(**OWNER, task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "owner"))
    assert not [path for path in (tmp_path / "owner").rglob("*") if "provider" in path.name]
    secrets = load_file(provider / "adapter_model.safetensors").values()
    content = b"".join(path.read_bytes() for path in (tmp_path / "owner").iterdir())
    assert not any(tensor.contiguous().numpy().tobytes()[:64] in content for tensor in secrets)
    outside = PeftModel.from_pretrained(copy_of(llama), str(tmp_path / "owner"))
    assert list(outside.peft_config) == ["default"]
    model.save_pretrained(str(tmp_path / "asked"), selected_adapters=["provider"])
    assert (tmp_path / "asked" / "provider" / "adapter_model.safetensors").exists()


def test_trainer_checkpoints_and_resumes_the_owners(worker: LocalWorker, tmp_path: Path) -> None:
    """With gradient checkpointing; its checkpoints are of the owner's adapter alone, and it goes on from them."""
    llama = ARCHITECTURES["llama"].build(torch.float32)
    provider = provider_of(llama, tmp_path / "provider")
    rows = batch((8,) * 8, llama.config.vocab_size)
    data = [{"input_ids": ids, "labels": ids} for ids in rows.input_ids]

    def train(model: Any, out: str, **how: Any) -> dict[str, torch.Tensor]:
        quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3}
        steps: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
        arguments = TrainingArguments(str(tmp_path / out), activation_checkpointing=True, **steps, **quiet)
        Trainer(model, arguments, train_dataset=data).train(**how)
        return trained(model)

    expected = train(reference(llama, provider), "plain")
    with protected(copy_of(llama), worker) as model:
        found = train(stacked(model, provider), "ours")
    with protected(copy_of(llama), worker) as model:
        resumed = train(
            stacked(model, provider), "ours", resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2")
        )
    assert largest_deviation(expected, found) < 1e-3
    assert largest_deviation(found, resumed) < 1e-5
    (tmp_path / "plain" / "checkpoint-2" / "provider" / "adapter_model.safetensors").stat()  # as PEFT does by itself
    assert not [path for path in (tmp_path / "ours").rglob("*") if path.name == "provider"]
    saved = json.loads((tmp_path / "ours" / "checkpoint-4" / "adapter_config.json").read_text())
    assert saved["r"] == OWNER["r"]
