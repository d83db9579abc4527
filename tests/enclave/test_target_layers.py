"""Which layers go to the worker, and which share a crossing, for every architecture of the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from obfuscatune.enclave.target_layers import find_groups, find_target_layers
from obfuscatune.errors import ProtectionError
from tests.contract.architectures import ARCHITECTURES

ATTENTION = "self_attn.q_proj+k_proj+v_proj"


def block(stem: str, *leaves: str) -> list[str]:
    """Names of the groups of one block."""
    return [f"{stem}.{{}}.{leaf}" for leaf in leaves]


BLOCKS = {
    "gpt2": block("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    **dict.fromkeys(
        ("llama", "llama-biased", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"),
        block("model.layers", ATTENTION, "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"),
    ),
    "phi": block("model.layers", ATTENTION, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "opt": block("model.decoder.layers", ATTENTION, "self_attn.out_proj", "fc1", "fc2"),
    "gpt_neox": block(
        "gpt_neox.layers",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
    "bert": block(
        "bert.encoder.layer",
        "attention.self.query+key+value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
}


def names(model: nn.Module, first_blocks: int = 0) -> list[str]:
    return [group.name for group in find_groups(model, first_blocks)]


@pytest.fixture(scope="module", params=BLOCKS)
def case(request: pytest.FixtureRequest) -> tuple[Any, list[str], dict[str, Any]]:
    """A model, its block's groups, and what PEFT must be told."""
    chosen = ARCHITECTURES[request.param]
    return chosen.build(torch.float32), BLOCKS[request.param], chosen.lora


def test_groups_of_every_architecture(case: Any) -> None:
    model, block, _ = case
    assert sorted(names(model)) == sorted(name.format(index) for index in range(2) for name in block)
    assert sorted(names(model, first_blocks=1)) == sorted(name.format(1) for name in block)


def test_groups_cover_the_blocks_and_nothing_else(case: Any) -> None:
    model, _, _ = case
    groups = find_groups(model, 0)
    targets = [target for group in groups for target in group.targets]
    assert [(target.in_features, target.out_features) for target in targets]
    assert all(target.layer is model.get_submodule(target.path) for target in targets)
    assert len({target.path for target in targets}) == len(targets) == len(list(find_target_layers(model)))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert not any(target.layer in (head, embeddings) for target in targets)
    for group in groups:
        assert group.widths == tuple(target.out_features for target in group.targets)
        assert {target.in_features for target in group.targets} == {group.in_features}


def test_adapters_are_no_sites(case: Any) -> None:
    model, _, lora = case
    plain = names(model)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", **lora))
    try:
        assert names(adapted) == [f"base_model.model.{name}" for name in plain]
        assert all(
            ".base_layer" in target.path and ".base_layer" not in target.name for target in find_target_layers(adapted)
        )
    finally:
        adapted.unload()


def test_modules_that_are_trained_whole_stay(case: Any) -> None:
    model = ARCHITECTURES["llama"].build(torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    assert not any("down_proj" in name for name in names(adapted))
    assert len(names(adapted)) == 6


def test_siblings_of_another_width_do_not_share() -> None:
    block = nn.Module()
    block.q_proj, block.k_proj, block.v_proj = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(7, 3)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert names(model) == ["layers.0.q_proj+k_proj", "layers.0.v_proj"]


@pytest.mark.parametrize("first_blocks", [2, 50])
def test_nothing_left_to_protect(first_blocks: int) -> None:
    with pytest.raises(ProtectionError, match=f"beyond the first {first_blocks} blocks"):
        find_groups(ARCHITECTURES["llama"].build(torch.float32), first_blocks)


def test_no_blocks_at_all() -> None:
    with pytest.raises(ProtectionError, match="no linear layers to offload in Sequential"):
        find_groups(nn.Sequential(nn.Linear(3, 3)), 0)
