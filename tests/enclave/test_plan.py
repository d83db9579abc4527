"""The plan against what protecting a real model does, and against the published sizes of models."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from obfuscatune.enclave.client import ClientStats, WorkerClient
from obfuscatune.enclave.plan import Plan, make_plan, model_from_config
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.protect import protect
from obfuscatune.errors import ModelFileError, ProtectionError

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
TINY_GPT2 = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32)
TINY_LLAMA = LlamaConfig(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    vocab_size=50,
    attention_bias=True,
)


class CountingClient(WorkerClient):
    """Multiplies here, and counts what would have crossed."""

    def __init__(self) -> None:
        self.matrices: dict[bytes, torch.Tensor] = {}
        self.crossings = 0
        self.bytes = 0

    def store(self, matrix_id, source, *, shape, dtype, tensor=None, widths=()):
        self.matrices[matrix_id] = tensor

    computes_apart = False
    stats = ClientStats()

    def refusing(self):
        return nullcontext()

    def allocate(self, rows, cols, dtype):
        return torch.empty(rows, cols, dtype=dtype)

    def submit(self, matrix_id, rows, *, transpose, reply_dtype=None, known_finite=False, product_unchecked=False):
        W_star = self.matrices[matrix_id]
        product = rows @ (W_star.T if transpose else W_star)
        self.crossings += 1
        self.bytes += rows.nbytes + product.nbytes
        return SimpleNamespace(result=lambda: product, own=torch.clone, dtype=product.dtype)

    def taken(self) -> tuple[int, int]:
        """Crossings and bytes since the last call."""
        counted = self.crossings, self.bytes
        self.crossings = self.bytes = 0
        return counted


def plan_of(config: PretrainedConfig, folder: Path, **knobs: object) -> Plan:
    config.save_pretrained(folder)
    return make_plan(model_from_config(folder / "config.json"), resolve("private", **{"first_blocks": 0, **knobs}))


@pytest.mark.parametrize(
    ("width", "layers", "parameters", "stay"),
    [
        (768, 12, 124_439_808, 39_505_152),
        (1024, 24, 354_823_168, 52_833_280),
        (1280, 36, 774_030_080, 66_241_280),
        (1600, 48, 1_557_611_200, 83_051_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_the_gpt2_family_has_its_published_sizes(tmp_path, width, layers, parameters, stay):
    """By hand: (50257 + 1024 + 2) d of embeddings and the last norm; in each block 4 d of norms and 9 d of biases."""
    plan = plan_of(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64), tmp_path)
    assert plan.parameters == parameters
    assert plan.enclave_parameters == stay == (50257 + 1024 + 2) * width + layers * 13 * width
    assert (plan.forward_crossings, plan.backward_crossings) == (4 * layers, 4 * layers - 1)


def test_gpt2_xl_keeps_5_3_percent(tmp_path):
    plan = plan_of(GPT2Config(n_embd=1600, n_layer=48, n_head=25), tmp_path)
    assert f"{plan.enclave_share:.1%}" == "5.3%"
    assert plan.enclave["head"] == 0, "the head is tied to the embeddings and counts there"


def test_llama_3_8b_takes_seconds(tmp_path):
    began = time.perf_counter()
    plan = plan_of(LLAMA_8B, tmp_path)
    assert time.perf_counter() - began < 10  # under one second on an idle machine
    assert plan.parameters == 8_030_261_248
    assert plan.enclave["head"] == plan.enclave["embeddings"] == 128256 * 4096
    assert plan.worker_parameters == 32 * (4096 * (6144 + 4096 + 2 * 14336) + 14336 * 4096)
    (run,) = plan.runs()
    assert (run.first, run.last, len(run.columns)) == (0, 31, 4)


@pytest.mark.parametrize("first_blocks", [0, 1])
@pytest.mark.parametrize("config", [TINY_GPT2, TINY_LLAMA], ids=lambda config: config.model_type)
def test_the_plan_is_what_protect_does(config, first_blocks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    knobs = {"first_blocks": first_blocks, "mixing": False, "allow_unsafe": True}
    plan = make_plan(model, resolve("private", **knobs))
    total = sum(parameter.numel() for parameter in model.parameters())
    client = CountingClient()
    lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=config is TINY_GPT2)
    protected = get_peft_model(protect(model, client, **knobs), lora)

    in_enclave = sum(it.numel() for name, it in protected.named_parameters() if "lora_" not in name)
    assert (plan.parameters, plan.enclave_parameters) == (total, in_enclave)
    assert plan.worker_parameters == sum(it.numel() for it in client.matrices.values())
    assert plan.upload_bytes == sum(it.nbytes for it in client.matrices.values())

    tokens = torch.randint(config.vocab_size, (2, 7))
    loss = protected(input_ids=tokens, labels=tokens).loss
    assert client.taken() == (plan.forward_crossings, plan.forward_bytes * tokens.numel())
    loss.backward()
    assert client.taken() == (plan.backward_crossings, plan.backward_bytes * tokens.numel())


def test_kinds_are_counted_apart():
    model = AutoModelForCausalLM.from_config(TINY_LLAMA)
    plan = make_plan(model, resolve("private", first_blocks=1))
    assert plan.enclave == {
        "embeddings": 50 * 16,
        "norms": 16 * (2 * 3 + 1),
        "biases": 3 * (16 + 8 + 8 + 16),
        "head": 50 * 16,
        "first_blocks": 16 * (16 + 8 + 8 + 16) + 3 * 16 * 24,
        "other": 0,
    }


def test_experts_are_planned_as_one_line_a_stack(tmp_path):
    config = MixtralConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=4,
        vocab_size=50,
    )
    plan = plan_of(config, tmp_path)
    _, _, up, down = plan.layers[:4]
    assert (up.name, up.p, up.q) == ("model.layers.0.mlp.experts.gate_up_proj", 16, 48)
    assert (up.count, up.active, up.parameters, up.forward_crossings) == (4, 2, 4 * 16 * 48, 4)
    assert down.forward_bytes == 2 * (24 + 16) * 4, "a token goes through two of four experts"
    assert plan.worker_parameters == 2 * (16 * 16 * 4 + 4 * 3 * 16 * 24)
    assert [it.name for it in plan.unmoved] == ["model.layers.*.mlp.gate.weight"], "routing stays in the enclave"


def test_experts_beyond_any_memory_are_planned(tmp_path):
    config = MixtralConfig(hidden_size=2**14, intermediate_size=2**16, num_local_experts=2**7, num_hidden_layers=2)
    plan = plan_of(config, tmp_path)
    assert plan.worker_parameters > 2 * 2**7 * 3 * 2**30, "800 billion parameters, none of them allocated"


def test_an_encoder_is_planned_too(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    plan = plan_of(config, tmp_path)
    assert plan.forward_crossings == 2 * 4
    assert plan.parameters == plan.enclave_parameters + plan.worker_parameters


def test_blocks_that_differ_are_not_folded():
    model = GPT2LMHeadModel(TINY_GPT2)
    plan = make_plan(model, resolve("private", first_blocks=1))
    assert [(run.first, run.last, run.columns[0][0].place) for run in plan.runs()] == [
        (0, 0, "enclave"),
        (1, 2, "worker"),
    ]


def test_shield_rows_are_stated_apart():
    model = GPT2LMHeadModel(TINY_GPT2)
    profiles = (resolve("private", mixing=mixing, allow_unsafe=True) for mixing in (True, False))
    with_rows, without = (make_plan(model, profile) for profile in profiles)
    assert (with_rows.shield_rows, without.shield_rows) == (8, 0)
    assert with_rows.forward_bytes == without.forward_bytes


def test_half_as_many_bytes_in_bfloat16():
    model = GPT2LMHeadModel(TINY_GPT2)
    full, half = (make_plan(model, resolve("private"), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (full.forward_bytes, full.upload_bytes) == (2 * half.forward_bytes, 2 * half.upload_bytes)


def test_nothing_beyond_the_first_blocks_is_refused():
    with pytest.raises(ProtectionError, match="beyond the first 3 blocks"):
        make_plan(GPT2LMHeadModel(TINY_GPT2), resolve("private", first_blocks=3))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-architecture"}'])
def test_what_is_no_configuration_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ModelFileError):
        model_from_config(file)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        model_from_config(tmp_path)
