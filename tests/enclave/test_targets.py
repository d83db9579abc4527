"""LoRA's targets on a protected model: what PEFT would leave out without a word is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from obfuscatune import load, protect
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ProtectionError
from tests.contract.architectures import ARCHITECTURES

IDS = torch.arange(3, 9)[None]


def wrapped(model, **targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns where it leaves out everything
        return get_peft_model(model, LoraConfig(r=2, **targets))


@pytest.mark.parametrize(
    ("targets", "absent"),
    [
        ({"target_parameters": ["down_proj.weight"]}, "layers.1.mlp.down_proj.weight lies on the worker"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["layers.1.mlp.up_proj.weight"]},
            "layers.1.mlp.up_proj.weight lies on the worker",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
            "the model has no such parameter in this process",
        ),
    ],
)
def test_target_parameters_on_the_worker_are_refused(worker: LocalWorker, targets, absent):
    protected = protect(ARCHITECTURES["llama"].build(torch.float32), worker.address, first_blocks=1)
    model = wrapped(protected, **targets)
    with pytest.raises(ProtectionError, match=absent):
        model(input_ids=IDS)
    protected.protection.close()


def test_target_parameters_in_the_enclave_are_adapted(worker: LocalWorker):
    protected = protect(ARCHITECTURES["llama"].build(torch.float32), worker.address, first_blocks=1)
    model = wrapped(protected, target_modules=[], target_parameters=["layers.0.mlp.down_proj.weight"])
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    protected.protection.close()


def test_an_adapter_names_its_base_as_the_user_did(worker: LocalWorker, tmp_path: Path, monkeypatch):
    directory = tmp_path / "plain"
    ARCHITECTURES["llama"].build(torch.float32).save_pretrained(directory)
    repository = tmp_path / "hub" / "models--acme--tiny"
    revision = "0" * 40
    shutil.copytree(directory, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("acme/tiny", str(directory)):
        protected = load(name, worker.address)
        adapted = wrapped(protected, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks the hub whether the vocabulary is the base's, and is offline
            adapted.save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name
        protected.protection.close()
