"""LoRA factors and their files, read back by PEFT itself."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from obfuscatune.errors import ConfigError, ModelFileError
from obfuscatune.training.adapter import (
    CONFIG,
    WEIGHTS,
    adapter_files,
    add_lora,
    check_adapter,
    check_lora,
    load_adapter,
    set_adapter_weights,
)

IDS = torch.arange(12).view(2, 6)


def with_lora(model, *, seed=3, targets="all-linear", r=4):
    return add_lora(model, r=r, alpha=8.0, dropout=0.1, targets=targets, seed=seed)


def perturbed(model):
    """Factors as after training: B is no longer zero."""
    wrapped = with_lora(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return wrapped.eval()


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def adapter_dir(model, tmp_path):
    return write(tmp_path / "adapter", adapter_files(perturbed(copy.deepcopy(model))))


def test_fresh_factors_change_nothing(model):
    plain = model(IDS).logits
    assert torch.equal(with_lora(model).eval()(IDS).logits, plain)


def test_factors_depend_on_seed_and_name_and_on_no_generator(model):
    states = []
    for draw, seed in ((0, 3), (1, 3), (0, 4)):
        torch.manual_seed(draw)
        wrapped = with_lora(copy.deepcopy(model), seed=seed)
        states.append({name: p for name, p in wrapped.named_parameters() if ".lora_A." in name})
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    shapes = [tuple(p.shape) for p in first.values()]
    same_shape = [p for p in first.values() if tuple(p.shape) == max(shapes, key=shapes.count)]
    assert not torch.equal(same_shape[0], same_shape[1])


def test_factors_are_spread_as_peft_spreads_them():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=16
    )
    wrapped = with_lora(LlamaForCausalLM(config), r=16)
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            assert parameter.abs().max() <= bound
            # Uniform over 16 * 256 draws: the standard error of the deviation is 0.7 %; five of them.
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.035)


def test_the_callers_random_state_is_left_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with_lora(model)
    assert torch.equal(torch.rand(1), expected)


def test_only_the_factors_are_trained(model):
    trainable = [name for name, p in with_lora(model).named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_targets_that_are_not_there_are_refused(model):
    with pytest.raises(ConfigError, match="--lora-targets: the model has no layer q_proj; did you mean c_proj"):
        with_lora(model, targets=("q_proj",))
    with pytest.raises(ConfigError, match="LoRA cannot be put on this model: Target module LayerNorm"):
        with_lora(model, targets=("ln_1",))


def test_a_misspelt_name_among_the_targets_is_refused(model):
    with pytest.raises(ConfigError, match="the model has no layer c_atn; did you mean c_attn"):
        with_lora(model, targets=("c_proj", "c_atn"))
    with pytest.raises(ConfigError, match="the model has no layer up; the linear layers are c_attn, c_fc, c_proj"):
        with_lora(model, targets=("c_proj", "up"))
    with_lora(model, targets=("c_proj", "transformer.h.1.mlp.c_fc"))


def empty(model):
    return copy.deepcopy(model).to("meta")


def test_targets_are_checked_without_weights(model):
    check_lora(empty(model), "all-linear")
    check_lora(empty(model), ("c_fc",))
    with pytest.raises(ConfigError, match="did you mean c_attn"):
        check_lora(empty(model), ("c_proj", "c_atn"))
    with pytest.raises(ConfigError, match="LoRA cannot be put on this model"):
        check_lora(empty(model), ("ln_1",))


def test_an_adapter_is_checked_without_weights(model, adapter_dir):
    check_adapter(empty(model), adapter_dir, weights_at_hand=False)
    wider = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=257))
    with pytest.raises(ModelFileError, match=r"should have shape \[4, 32\], and has \[4, 16\]"):
        check_adapter(empty(wider), adapter_dir, weights_at_hand=False)
    shallower = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=64, vocab_size=257))
    with pytest.raises(ModelFileError, match=r"does not fit the model: .*\.h\.1\..* should have shape none"):
        check_adapter(empty(shallower), adapter_dir, weights_at_hand=False)
    (adapter_dir / WEIGHTS).write_bytes((adapter_dir / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="not a whole safetensors file"):
        check_adapter(empty(model), adapter_dir, weights_at_hand=False)


@pytest.mark.parametrize("need", [{"use_dora": True}, {"target_parameters": ["experts.gate_up_proj"]}])
def test_an_adapter_that_needs_the_weights_is_refused_where_they_are_not(model, adapter_dir, need):
    config = json.loads((adapter_dir / CONFIG).read_text())
    (adapter_dir / CONFIG).write_text(json.dumps(config | need))
    with pytest.raises(ModelFileError, match=f"{next(iter(need))}: such an adapter needs the weights themselves"):
        check_adapter(empty(model), adapter_dir, weights_at_hand=False)


def test_peft_itself_reads_the_files(model, adapter_dir):
    expected = perturbed(copy.deepcopy(model))(IDS).logits
    assert torch.equal(PeftModel.from_pretrained(model, adapter_dir).eval()(IDS).logits, expected)


def test_we_read_the_files_of_peft(model, tmp_path):
    trained = perturbed(copy.deepcopy(model))
    trained.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_adapter(model, tmp_path / "theirs")(IDS).logits, trained(IDS).logits)


def test_the_same_factors_are_the_same_bytes(model):
    assert adapter_files(perturbed(copy.deepcopy(model))) == adapter_files(perturbed(copy.deepcopy(model)))


def test_the_config_is_pefts_own(model, adapter_dir, tmp_path):
    perturbed(copy.deepcopy(model)).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (adapter_dir, tmp_path / "theirs"))
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, None, "not an adapter: there is no adapter_model.safetensors"),
        (CONFIG, None, "not an adapter: there is no adapter_config.json"),
        (WEIGHTS, b"", "not a whole safetensors file"),
        (WEIGHTS, b"\x80\x04N.", "not a whole safetensors file"),
        (WEIGHTS, save({"a": torch.zeros(1)}), "does not fit the model: a should have shape none"),
        (CONFIG, b"{", "not an adapter's configuration"),
        (CONFIG, b"[]", "not an adapter's configuration"),
        (CONFIG, b'{"peft_type": "EVIL"}', "not an adapter's configuration"),
        (CONFIG, b'{"peft_type": "PREFIX_TUNING"}', "expected a LoRA adapter, found PeftType.PREFIX_TUNING"),
        (CONFIG, b'{"peft_type": "LORA", "target_modules": ["x"]}', "does not fit the model: LoRA cannot be put"),
        (CONFIG, b" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
)
def test_each_damage_is_named(model, adapter_dir, name, content, message):
    if content is None:
        (adapter_dir / name).unlink()
    else:
        (adapter_dir / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        load_adapter(model, adapter_dir)


def test_weights_cut_short_are_refused(model, adapter_dir):
    content = (adapter_dir / WEIGHTS).read_bytes()
    (adapter_dir / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match="not a whole safetensors file"):
        load_adapter(model, adapter_dir)


def test_an_adapter_in_pickle_is_never_read(model, adapter_dir):
    (adapter_dir / WEIGHTS).rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(ModelFileError, match="there is no adapter_model"):
        load_adapter(model, adapter_dir)


def test_factors_of_another_rank_are_refused(model, adapter_dir):
    wrapped = with_lora(model, r=2)
    with pytest.raises(ModelFileError, match=r"should have shape \[2, 16\], and has \[4, 16\]"):
        set_adapter_weights(wrapped, (adapter_dir / WEIGHTS).read_bytes(), where="x")
