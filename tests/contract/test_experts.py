"""Mixtures of experts: each expert's matrices on the worker, routing in the enclave, the same numbers as plain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from obfuscatune import load, protect
from obfuscatune.enclave.experts import ProtectedExperts
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ProtectionError
from tests.contract.architectures import Architecture
from tests.contract.comparison import KEY, batch, copy_of, deviation, greedy, largest_deviation

# torch's grouped product, which transformers prefers, knows no float64: plain experts are called one after another
_SMALL = {"experts_implementation": "eager"} | {
    "hidden_size": 48,
    "intermediate_size": 59,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LATENT = {"q_lora_rank": 17, "kv_lora_rank": 13, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 11}
MIXTURES = {
    "mixtral": _SMALL | {"num_local_experts": 5},
    "qwen2_moe": _SMALL
    | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 29, "shared_expert_intermediate_size": 31},
    "qwen3_moe": _SMALL
    | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 29, "head_dim": 14, "norm_topk_prob": True},
    "olmoe": _SMALL | {"num_experts": 5, "num_experts_per_tok": 2},
    "granitemoe": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 7},
    "deepseek_v3": _SMALL
    | _LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 29}
    | {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
ATTENTION = r".*\.(q_proj|o_proj|q_b_proj|kv_b_proj)"

pytestmark = pytest.mark.usefixtures("float64_throughout")


@pytest.fixture(scope="module", params=MIXTURES)
def built(request: pytest.FixtureRequest) -> Any:
    """The plain model in float64. Not to be changed."""
    return Architecture(request.param, MIXTURES[request.param]).build(torch.float64)


@pytest.fixture(params=["load", "protect"])
def pair(request: pytest.FixtureRequest, built: Any, worker: LocalWorker, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """A plain model, and the same with its experts on the worker."""
    if request.param == "load":
        built.save_pretrained(tmp_path)
        options = {"dtype": torch.float64, "experts_implementation": "eager"}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        model = load(tmp_path, worker.address, first_blocks=0, key=KEY, **options)
    else:
        plain, model = copy_of(built), protect(copy_of(built), worker.address, first_blocks=0, key=KEY)
    yield plain, model
    model.protection.close()


def test_forward_and_generation(pair: tuple[Any, Any]) -> None:
    plain, shielded = pair
    inputs = batch((13, 4), 97)
    with torch.no_grad():
        expected, found = plain(**inputs.inputs()).logits, shielded(**inputs.inputs()).logits
    assert deviation(inputs.attended(expected), inputs.attended(found)) < 1e-9
    prompt = batch((6,), 97)
    assert torch.equal(greedy(shielded, prompt, tokens=12), greedy(plain, prompt, tokens=12))
    stacks = [name for name, it in shielded.named_parameters() if it.dim() == 3]
    assert not stacks, "an expert's matrix is still in the enclave"
    assert any(isinstance(module, ProtectedExperts) for module in shielded.modules())


def test_gradients_through_experts(pair: tuple[Any, Any]) -> None:
    """Of LoRA's factors on attention, and of the embeddings that are given in place of token ids."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            adapted = get_peft_model(model, LoraConfig(r=3, target_modules=ATTENTION, init_lora_weights=False))
        adapted.train()
        ids = batch((9, 9), 97).input_ids
        embeddings = adapted.get_input_embeddings()(ids).detach().requires_grad_()
        adapted(inputs_embeds=embeddings, labels=ids).loss.backward()
        found = {name: it.grad for name, it in adapted.named_parameters() if "lora_" in name}
        return {**found, "embeddings": embeddings.grad}

    expected, found = (gradients(model) for model in pair)
    assert all(it is not None and it.abs().max() > 0 for it in expected.values())
    assert largest_deviation(expected, found) < 1e-9


def test_one_request_for_each_expert_that_is_hit(worker: LocalWorker) -> None:
    plain = Architecture("mixtral", MIXTURES["mixtral"]).build(torch.float64)
    hit = []
    for layer in plain.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: hit.append(args[1].unique().numel()))
    inputs = batch((3,), 97)
    plain(**inputs.inputs())
    layers, experts = len(hit), sum(hit)
    model = protect(copy_of(plain), worker.address, first_blocks=0, key=KEY)
    before = model.protection.stats.snapshot()
    model(**inputs.inputs())
    assert model.protection.stats.since(before).crossings == 2 * layers + 2 * experts
    model.protection.close()


def test_the_first_block_keeps_its_experts(worker: LocalWorker) -> None:
    plain = Architecture("mixtral", MIXTURES["mixtral"]).build(torch.float64)
    model = protect(copy_of(plain), worker.address, first_blocks=1, key=KEY)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert not isinstance(first, ProtectedExperts) and isinstance(second, ProtectedExperts)
    inputs = batch((7,), 97).inputs()
    with torch.no_grad():
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-9
    model.protection.close()


def test_rekeyed_experts_compute_the_same(worker: LocalWorker) -> None:
    plain = Architecture("mixtral", MIXTURES["mixtral"]).build(torch.float64)
    model = protect(copy_of(plain), worker.address, first_blocks=0, key=KEY)
    inputs = batch((7,), 97).inputs()
    model.protection.rekey()
    with torch.no_grad():
        assert deviation(plain(**inputs).logits, model(**inputs).logits) < 1e-9
    model.protection.close()


def test_a_stack_of_experts_cannot_be_read(worker: LocalWorker) -> None:
    plain = Architecture("mixtral", MIXTURES["mixtral"]).build(torch.float64)
    model = protect(plain, worker.address, first_blocks=0)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, ProtectedExperts) and type(experts).__name__ == "ProtectedMixtralExperts"
    assert experts.gate_up_proj.shape == (5, 118, 48) and experts.gate_up_proj.dtype == torch.float64
    with pytest.raises(ProtectionError, match="lies on the worker"):
        experts.gate_up_proj.sum()
    with pytest.raises(ProtectionError, match="lies on the worker"):
        experts.down_proj = nn.Parameter(torch.zeros(5, 48, 59))
    model.protection.close()
