"""`--provider-adapter`: the provider's adapter under the owner's, in every command that has a model."""

import io
import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.training.provider_adapter import adapter_digest

PROMPT = "Once upon a time"


def make_adapter(model_directory, folder, seed, **settings):
    """An adapter that changes what the model says."""
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        usual = {"r": 2, "lora_alpha": 0.5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        get_peft_model(model, LoraConfig(init_lora_weights=False, **usual, **settings)).save_pretrained(folder)
    return folder


@pytest.fixture
def provider(stories260k, tmp_path):
    return make_adapter(stories260k, tmp_path / "provider", 1)


@pytest.fixture
def finetune(obfuscatune, stories260k, notes, tmp_path, provider):
    """Runs some steps on top of the provider's adapter."""

    def run(steps, *options, out="run", adapter=provider):
        return obfuscatune(
            *("finetune", "--model", stories260k, "--provider-adapter", adapter, "--data", notes, "--json"),
            *(
                "--out",
                tmp_path / out,
                "--max-steps",
                steps,
                "--batch-size",
                3,
                "--lr",
                0.01,
                "--schedule",
                "constant",
                *options,
            ),
        )

    return run


def plain_logits(stories260k, **adapters):
    """Plain PEFT with these adapters, all active."""
    ids = AutoTokenizer.from_pretrained(stories260k)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    peft_model = None
    for name, folder in adapters.items():
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            peft_model.load_adapter(folder, adapter_name=name)
    peft_model.base_model.set_adapter(list(adapters))
    return peft_model.eval()(ids).logits


@pytest.mark.parametrize("profile", ["private", "guarded"])
def test_the_owners_adapter_is_that_of_the_plain_run_and_his_alone(
    finetune, provider, stories260k, tmp_path, worker, mask_worker, profile
):
    workers = ("--worker", worker.address, *(("--mask-worker", mask_worker.address) if profile == "guarded" else ()))
    calm = ("--lr", 0.001)  # AdamW's first steps have the size of the rate wherever a gradient is mere rounding
    ran = finetune(3, *calm, "--profile", profile, *workers)
    assert ran.code == 0, ran.stderr
    assert "provider's adapter: " in ran.stderr
    plain = finetune(3, *calm, "--plain", out="plain")
    assert plain.code == 0, plain.stderr
    assert ran.document["last_loss"] == pytest.approx(plain.document["last_loss"], abs=1e-4)
    adapter = tmp_path / "run" / "adapter"
    secrets = load_file(provider / "adapter_model.safetensors")
    told = {"sha256": adapter_digest(provider), "parameters": sum(tensor.numel() for tensor in secrets.values())}
    assert ran.document["provider_adapter"] == told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["provider_adapter"] == told
    for path in [path for path in (tmp_path / "run").rglob("*") if path.is_file()]:
        assert not any(tensor.numpy().tobytes()[:64] in path.read_bytes() for tensor in secrets.values()), path
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert not any("provider" in name for name in file.keys())  # noqa: SIM118
        assert file.metadata()["provider_adapter_sha256"] == told["sha256"]
    both = plain_logits(stories260k, provider=provider, default=adapter)
    for alone in ({"provider": provider}, {"default": adapter}):
        assert (both - plain_logits(stories260k, **alone)).abs().max() > 1e-3


@pytest.fixture
def tuned(finetune, tmp_path):
    ran = finetune(3, "--plain")
    assert ran.code == 0, ran.stderr
    return tmp_path / "run" / "adapter"


def test_both_are_active_when_it_generates(obfuscatune, stories260k, provider, tuned, worker):
    """The text of plain PEFT with both; each of the adapters changes it."""
    greedy = ("generate", "--model", stories260k, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")

    def text(*options):
        ran = obfuscatune(*greedy, *options)
        assert ran.code == 0, ran.stderr
        return ran.document["text"]

    both = ("--adapter", tuned, "--provider-adapter", provider)
    found = text(*both, "--worker", worker.address)
    assert found == text(*both, "--plain")
    assert found != text("--provider-adapter", provider, "--plain")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories260k), provider, "provider")
    model.load_adapter(tuned, "default")
    model.base_model.set_adapter(["provider", "default"])
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_chat_and_evaluate_take_it(obfuscatune, stories260k, provider, tuned, notes, worker, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    both = ("--model", stories260k, "--adapter", tuned, "--provider-adapter", provider, "--worker", worker.address)
    for command in (("chat", "--max-new-tokens", 2), ("evaluate", "--data", notes, "--limit", 2, "--compare-plain")):
        ran = obfuscatune(*command, *both, "--json")
        assert ran.code == 0, ran.stderr
        assert "provider's adapter: " in ran.stderr


def test_an_adapter_needs_the_provider_it_was_trained_on(obfuscatune, stories260k, provider, tuned, tmp_path):
    run = ("generate", "--model", stories260k, "--prompt", PROMPT, "--adapter", tuned, "--plain")
    other = make_adapter(stories260k, tmp_path / "other", 2)
    for options, has in (((), "no provider's adapter"), (("--provider-adapter", other), "another one, sha256")):
        ran = obfuscatune(*run, *options)
        assert ran.code == 1
        assert f"sha256 {adapter_digest(provider)}, and the model has {has}" in ran.stderr
        assert "PLAIN RUN" not in ran.stderr, "a refused run loads no model"


def test_a_run_goes_on_with_the_same_provider_alone(finetune, provider, stories260k, tmp_path):
    assert finetune(2, "--plain").code == 0
    other = make_adapter(stories260k, tmp_path / "other", 2)
    refused = finetune(4, "--plain", "--resume", adapter=other)
    assert refused.code == 2
    assert f"provider_adapter was '{adapter_digest(provider)}' and is '{adapter_digest(other)}'" in refused.stderr
    assert "PLAIN RUN" not in refused.stderr, "a refused run loads no model"
    moved = shutil.copytree(provider, tmp_path / "moved")
    resumed = finetune(4, "--plain", "--resume", adapter=moved)
    assert resumed.code == 0, resumed.stderr
    assert resumed.document["last_loss"] == finetune(4, "--plain", out="whole").document["last_loss"]


def test_run_file_and_environment(obfuscatune, finetune, provider, stories260k, tmp_path, monkeypatch):
    assert finetune(2, "--plain").code == 0
    again = obfuscatune("finetune", "--config", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "again", "--json")
    assert again.document["provider_adapter"]["sha256"] == adapter_digest(provider)
    monkeypatch.setenv("OBFUSCATUNE_PROVIDER_ADAPTER", str(provider))
    ran = obfuscatune("generate", "--model", stories260k, "--prompt", PROMPT, "--max-new-tokens", 1, "--plain")
    assert "provider's adapter: " in ran.stderr


def test_dry_run_and_inspect_count_it(obfuscatune, finetune, provider, stories260k):
    count = sum(tensor.numel() for tensor in load_file(provider / "adapter_model.safetensors").values())
    dry = finetune(2, "--dry-run", "--lora-r", 2).document
    assert dry["provider_adapter"]["parameters"] == count == dry["adapter"]["parameters"], "his own are counted alone"
    inspected = obfuscatune("inspect", "--model", stories260k, "--provider-adapter", provider, "--json").document
    assert inspected["provider_adapter"]["parameters"] == count
    assert (
        "of the provider's adapter"
        in obfuscatune("inspect", "--model", stories260k, "--provider-adapter", provider).stdout
    )


@pytest.mark.parametrize("command", ["finetune", "generate", "chat", "evaluate", "inspect"])
def test_what_cannot_be_used_is_one_line_before_long_work(
    obfuscatune, stories260k, notes, provider, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    needed = {"finetune": ("--data", notes, "--out", tmp_path / "run"), "generate": ("--prompt", "x")}
    needed["evaluate"] = ("--data", notes)
    worker = () if command == "inspect" else ("--worker", "unix:/nowhere/worker.sock")
    dora = make_adapter(stories260k, tmp_path / "dora", 3, use_dora=True)
    for adapter, options, code, message in (
        (tmp_path / "absent", (), 1, "absent: not an adapter: there is no adapter_model.safetensors"),
        (provider, ("--profile", "paper"), 2, "would show the worker the provider's adapter; take --profile private"),
        (dora, (), 2, "use_dora does not add up with another adapter"),
    ):
        given = (*needed.get(command, ()), *worker, "--provider-adapter", adapter, *options)
        ran = obfuscatune(command, "--model", stories260k, *given)
        assert ran.code == code, ran.stderr
        assert message in ran.stderr
        assert "connecting" not in ran.stderr
