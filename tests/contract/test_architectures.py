"""`inspect` and `load` agree on every architecture that transformers builds: what one calls fine the other loads.

Each is made small from its configuration class. Those that need settings of their own are left out, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from obfuscatune import load, protect
from obfuscatune.cli.app import run
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ObfuscaTuneError, ProtectionError
from tests.contract.architectures import Architecture
from tests.contract.comparison import backward, batch, copy_of, deviation, largest_deviation, protected, with_lora

SMALL: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{
        "d_model": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "ffn_dim": 48,
        "n_positions": 64,
        "word_embed_proj_dim": 32,
    },
    **{
        "state_size": 4,
        "time_step_rank": 2,
        "attention_hidden_size": 32,
        "rotary_dim": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
}
QUICK = (
    *("bert", "bloom", "codegen", "cohere", "deepseek_v3", "falcon", "falcon_mamba", "gemma3_text", "gpt2", "gpt_neox"),
    *("gpt_oss", "gptj", "granitemoe", "jamba", "jetmoe", "llama", "mamba", "mixtral", "olmo", "olmoe", "opt", "phi3"),
    *("qwen2_moe", "qwen3_moe", "rwkv", "stablelm"),
)
REFUSED = {"falcon_mamba", "jetmoe", "mamba", "rwkv"}


def small(model_type: str) -> PretrainedConfig | None:
    """A small configuration; None for one that cannot be made so."""
    kind = CONFIG_MAPPING[model_type]
    if kind.sub_configs or kind not in AutoModelForCausalLM._model_mapping:
        return None
    known = kind().to_dict().keys() | kind.attribute_map.keys()
    try:
        return AutoConfig.for_model(model_type, **{name: it for name, it in SMALL.items() if name in known})
    except Exception:  # sizes that do not go together there
        return None


def written(model_type: str, directory: Path) -> Any:
    """The model, also in its files; None where transformers cannot make it small."""
    config = small(model_type)
    if config is None:
        return None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if sum(it.numel() for it in model.parameters()) > 5_000_000:
            return None
        model.save_pretrained(directory)
        AutoModelForCausalLM.from_pretrained(directory).eval()(batch((7,), 97).input_ids)
    except Exception:
        return None
    return model


@contextmanager
def linked(worker: LocalWorker) -> Iterator[WorkerClient]:
    """A link that is closed at the end."""
    client = WorkerClient.open(worker.address)
    try:
        yield client
    finally:
        client.close()


def verdicts(directory: Path, worker: LocalWorker, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What `inspect` and `load` say: "" for fine, and the refusal otherwise."""
    failed = run(["inspect", "--json", "--model", str(directory), "--first-blocks", "0"])
    inspected = capsys.readouterr().err if failed else ""
    with linked(worker) as client:
        try:
            load(directory, client, first_blocks=0, dtype=torch.float32)
        except ObfuscaTuneError as error:
            assert not client.stats.uploads, "refused after something had been sent"
            return inspected, str(error)
        return inspected, ""


EVERY = [
    pytest.param(model_type, marks=() if model_type in QUICK else pytest.mark.long)
    for model_type in sorted(set(CONFIG_MAPPING) | set(QUICK))
]


@pytest.mark.parametrize("model_type", EVERY)
def test_inspect_and_load_agree(
    model_type: str, tmp_path: Path, worker: LocalWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is loaded computes what plain computes."""
    if written(model_type, tmp_path) is None:
        assert model_type not in QUICK
        pytest.skip("not made small by these settings")
    inspected, loaded = verdicts(tmp_path, worker, capsys)
    assert bool(inspected) == bool(loaded), (inspected, loaded)
    assert loaded in inspected
    if model_type in QUICK:
        assert bool(loaded) == (model_type in REFUSED), loaded
    if loaded:
        return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = batch((7,), 97).input_ids
    with linked(worker) as client, torch.no_grad():
        found = load(tmp_path, client, first_blocks=0, dtype=torch.float32)(ids).logits
        assert deviation(plain(ids).logits, found) < 1e-3


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("mamba", "MambaMixer reads the weight of this Linear itself"),
        ("falcon_mamba", "FalconMambaMixer reads the weight of this Linear itself"),
        ("rwkv", "reads the weight of this Linear itself"),
        ("jetmoe", "a JetMoeParallelExperts computes in its own way"),
    ],
)
def test_what_cannot_go_to_a_worker_is_refused_by_name(
    model_type: str, named: str, worker: LocalWorker, tmp_path: Path
) -> None:
    model = written(model_type, tmp_path)
    with linked(worker) as client:
        with pytest.raises(ProtectionError, match=named):
            protect(model, client, first_blocks=0)
        assert not client.stats.uploads


def test_falcon_is_protected(worker: LocalWorker, tmp_path: Path) -> None:
    """`FalconLinear` is a subclass of `nn.Linear` and computes the same."""
    config = FalconConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    ids = batch((9,), 97).input_ids
    with linked(worker) as client, torch.no_grad():
        model = load(tmp_path, client, first_blocks=0)
        assert deviation(plain(ids).logits, model(ids).logits) < 1e-4
        left = sum(it.numel() for it in model.parameters())
        assert left < 0.2 * sum(it.numel() for it in plain.parameters())


class Reads(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A model whose code multiplies by a layer's weight itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        last = self.model.layers[1].mlp
        output.logits = output.logits + (output.logits.mean() * last.down_proj.weight.sum())
        return output


def test_a_weight_that_the_models_own_code_reads_is_found(worker: LocalWorker) -> None:
    config = AutoConfig.for_model("llama", **{name: it for name, it in SMALL.items() if "head_dim" not in name})
    with linked(worker) as client:
        with pytest.raises(ProtectionError, match=r"down_proj\.weight.*the code of Reads reads the weight"):
            protect(Reads(config), client)
        assert not client.stats.uploads


def test_inspect_looks_through_the_files_too(
    tmp_path: Path, worker: LocalWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    written("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    inspected, loaded = verdicts(tmp_path, worker, capsys)
    assert "the config says (32, 50)" in loaded and loaded in inspected


@pytest.mark.usefixtures("float64_throughout")
def test_olmo_clips_in_place(worker: LocalWorker) -> None:
    """The outputs of q, k and v, which are parts of one product."""
    olmo = Architecture(
        "olmo",
        {"hidden_size": 48, "intermediate_size": 67, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"clip_qkv": 0.9},
    )
    plain, inputs = olmo.build(torch.float64), batch((9, 4), 97)
    unclipped = olmo.build(torch.float64, clip_qkv=None)
    with torch.no_grad():
        assert deviation(unclipped(**inputs.inputs()).logits, plain(**inputs.inputs()).logits) > 1e-3
    expected_loss, expected = backward(with_lora(copy_of(plain)), inputs)
    with protected(copy_of(plain), worker) as model:
        with torch.no_grad():
            assert deviation(plain(**inputs.inputs()).logits, model(**inputs.inputs()).logits) < 1e-9
        loss, found = backward(with_lora(model), inputs)
    assert deviation(expected_loss, loss) < 1e-9
    assert largest_deviation(expected, found) < 1e-9
