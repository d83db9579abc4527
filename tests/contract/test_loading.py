"""`load` from files gives what `protect` gives in memory, and both give the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from obfuscatune import load
from obfuscatune.enclave.local_worker import LocalWorker
from tests.contract.architectures import ARCHITECTURES, Architecture
from tests.contract.comparison import KEY, batch, deviation, greedy

# max_shard_size: one file, or about one tensor to a file and an index
FILES = {"one file": "1GB", "shards": "20KB"}


@pytest.fixture
def loaded(worker: LocalWorker) -> Any:
    """`load` whose models are closed at the end."""
    models = []

    def load_and_remember(*args: Any, **kwargs: Any) -> Any:
        models.append(load(*args, worker.address, key=KEY, **{"first_blocks": 0, **kwargs}))
        return models[-1]

    yield load_and_remember
    for model in models:
        model.protection.close()


@pytest.mark.parametrize("max_shard_size", FILES.values(), ids=FILES)
@torch.no_grad()
@pytest.mark.usefixtures("float64_throughout")
def test_loaded_is_plain(architecture: Architecture, loaded: Any, tmp_path: Path, max_shard_size: str) -> None:
    architecture.build(torch.float64).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"
    plain = architecture.auto_class.from_pretrained(tmp_path, dtype=torch.float64)
    model = loaded(tmp_path, auto_class=architecture.auto_class)
    inputs = batch((13, 4), plain.config.vocab_size)
    expected, found = plain(**inputs.inputs()), model(**inputs.inputs())
    assert deviation(inputs.attended(expected.logits), inputs.attended(found.logits)) < 1e-9
    assert not model.training
    assert model.protection.stats.crossings == architecture.crossings * plain.config.num_hidden_layers
    here = {name for name, parameter in model.named_parameters() if parameter.numel()}
    assert here < {name for name, _ in plain.named_parameters()}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_half_precision_files_in_float32(loaded: Any, tmp_path: Path) -> None:
    ARCHITECTURES["llama"].build(torch.float16).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = loaded(tmp_path, dtype=torch.float32)
    inputs = batch((13,), 97).inputs()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-4


@torch.no_grad()
def test_first_block_stays_with_its_weights(loaded: Any, tmp_path: Path) -> None:
    plain = ARCHITECTURES["gpt2"].build(torch.float32)
    plain.save_pretrained(tmp_path)
    model = loaded(tmp_path, first_blocks=1)
    inputs = batch((13,), 97).inputs()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, plain.transformer.h[0].attn.c_attn.weight)
    assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-4
    assert model.protection.stats.crossings == 4


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_tied_embeddings_stay_tied(loaded: Any, tmp_path: Path, tied: bool) -> None:
    plain = ARCHITECTURES["llama"].build(torch.float32, tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_the_real_model_tells_its_story(loaded: Any, stories260k: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    words = loaded(stories260k).generate(**prompt, do_sample=False, max_new_tokens=60)
    assert tokenizer.decode(words[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


def test_generation_settings_are_read(loaded: Any, tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].build(torch.float64)
    plain.generation_config.repetition_penalty = 1.7
    plain.save_pretrained(tmp_path)
    model, prompt = loaded(tmp_path), batch((5,), 97)
    assert model.generation_config.repetition_penalty == 1.7
    assert torch.equal(greedy(model, prompt, tokens=10), greedy(plain, prompt, tokens=10))
