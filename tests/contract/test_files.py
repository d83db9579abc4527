"""Files as transformers 5 reads them: ties that are none, heads that are new, several loads at once, its keywords."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3TextConfig,
)

from obfuscatune import load
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.protect import width_of
from obfuscatune.errors import ConfigError, ModelFileError
from obfuscatune.training.tokens import context_window
from tests.contract.architectures import ARCHITECTURES
from tests.contract.comparison import batch, deviation


@pytest.fixture
def loaded(worker: LocalWorker) -> Iterator[Any]:
    """`load` whose models are closed at the end."""
    models: list[Any] = []

    def load_and_remember(path: Path, **keywords: Any) -> Any:
        models.append(load(path, worker.address, **{"first_blocks": 0, **keywords}))
        return models[-1]

    yield load_and_remember
    for model in models:
        model.protection.close()


def save(name: str, directory: Path, **settings: Any) -> Path:
    ARCHITECTURES[name].build(torch.float32, **settings).save_pretrained(directory)
    return directory


@torch.no_grad()
def test_tied_by_the_configuration_and_two_tensors_in_the_files(loaded: Any, tmp_path: Path) -> None:
    """transformers 5 compares the two, and does not tie what differs."""
    file = save("llama", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, file, {"format": "pt"})
    plain, model = AutoModelForCausalLM.from_pretrained(tmp_path), loaded(tmp_path)
    ids = batch((9,), 97).input_ids
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert deviation(plain(ids).logits, model(ids).logits) < 1e-4


@torch.no_grad()
def test_tied_by_the_configuration_and_the_same_tensor_twice(loaded: Any, tmp_path: Path) -> None:
    file = save("llama", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    model = loaded(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_tied_and_the_head_alone_in_the_files(loaded: Any, tmp_path: Path) -> None:
    file = save("llama", tmp_path, tie_word_embeddings=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    model = loaded(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_a_classification_head_over_a_causal_checkpoint_is_new(loaded: Any, tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialised.*score\.weight"):
        model = loaded(tmp_path, auto_class=AutoModelForSequenceClassification, num_labels=3)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.score.weight.shape == (3, 48) and model.score.weight.isfinite().all()
    assert 0.5 < model.score.weight.std() / plain.score.weight.std() < 2
    plain.score.load_state_dict(model.score.state_dict())
    ids = batch((9,), 97).input_ids
    with torch.no_grad():
        assert deviation(plain(ids).logits, model(ids).logits) < 1e-4


def test_a_saved_classifier_warns_of_nothing(loaded: Any, tmp_path: Path) -> None:
    save("llama", tmp_path / "causal")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "causal", num_labels=3)
    plain.save_pretrained(tmp_path / "classifier")
    model = loaded(tmp_path / "classifier", auto_class=AutoModelForSequenceClassification)
    assert torch.equal(model.score.weight, plain.score.weight)


def test_four_loads_at_once(worker: LocalWorker, tmp_path: Path) -> None:
    """Building without weights patched all of torch, for every thread: later layers were left without memory."""
    save("llama", tmp_path)
    ids = batch((9,), 97).input_ids
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    start, found, devices = threading.Barrier(5), {}, []

    def one(index: int) -> None:
        start.wait()
        model = load(tmp_path, worker.address, dtype=dtypes[index])
        found[index] = model(ids).logits.detach()
        model.protection.close()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        layer = nn.Linear(4, 4)
        devices.append((layer.weight.device.type, layer.weight.dtype))
        threads[0].join(0.001)
    assert set(devices) <= {("cpu", torch.float32)}
    assert torch.get_default_dtype() == torch.float32
    assert [found[index].dtype for index in range(4)] == dtypes
    for index, bound in enumerate((1e-4, 1e-4, 1e-4, 0.1)):
        assert deviation(expected, found[index].float()) < bound


@pytest.mark.parametrize("said", ["auto", "float16", torch.float16, None])
def test_dtypes_by_name(loaded: Any, tmp_path: Path, said: Any) -> None:
    ARCHITECTURES["llama"].build(torch.float16).save_pretrained(tmp_path)
    assert loaded(tmp_path, dtype=said).lm_head.weight.dtype == torch.float16
    assert loaded(tmp_path, torch_dtype="float32").lm_head.weight.dtype == torch.float32


@torch.no_grad()
def test_familiar_keywords(loaded: Any, tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].build(torch.float32)
    plain.save_pretrained(tmp_path / "small", variant="fp32")
    accepted = {"device_map": "cpu", "low_cpu_mem_usage": True, "use_safetensors": True, "trust_remote_code": False}
    model = loaded(tmp_path, subfolder="small", variant="fp32", attn_implementation="eager", token=None, **accepted)
    assert model.config._attn_implementation == "eager"
    ids = batch((9,), 97).input_ids
    assert deviation(plain(ids).logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device_map": "auto"}, "device_map='auto' cannot be used.*leave it out"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "quantization_config.*unquantised"),
        ({"load_in_4bit": True}, "load_in_4bit.*unquantised"),
        ({"max_memory": {0: "1GB"}}, "max_memory.*--quota"),
        ({"dtype": "int8"}, "dtype: expected a floating-point"),
        ({"dtype": "nonsense"}, "dtype: expected a floating-point"),
        ({"use_safetensors": False}, "use_safetensors=False.*only safetensors"),
        ({"shield_row": 3}, "shield_row"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    worker: LocalWorker, tmp_path: Path, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(save("llama", tmp_path), worker.address, **keywords)


def test_a_tensor_that_no_file_holds_is_refused_before_anything_is_sent(loaded: Any, tmp_path: Path) -> None:
    file = save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFileError, match=r"model\.norm\.weight.* is missing"):
        loaded(tmp_path, auto_class=AutoModelForSequenceClassification)


@pytest.mark.parametrize("length", [8192, 512])
def test_the_window_and_width_of_a_composite_model_are_its_text_models(length: int) -> None:
    text = Gemma3TextConfig(max_position_embeddings=length, hidden_size=64, num_hidden_layers=2)
    config = Gemma3Config(text_config=text)
    assert context_window(config) == length
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    assert width_of(model) == 64
