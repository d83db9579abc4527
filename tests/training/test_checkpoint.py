"""Checkpoints: what is saved comes back bit for bit, and what is damaged or of another run is refused."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import save

from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.training.adapter import CONFIG, WEIGHTS, add_lora
from obfuscatune.training.checkpoint import OPTIMIZER, STATE, Progress, resume, save_checkpoint
from obfuscatune.training.data import Example
from obfuscatune.training.loop import OptimizerSettings, Plan, make_optimizer, train
from obfuscatune.training.storage import RunDirectory

EXAMPLES = [Example(tuple(range(i, i + 6)), tuple(range(i, i + 6))) for i in range(8)]
MADE_OF = {"lr": 0.01, "lora_targets": ("a", "b"), "data": "abc"}


def fresh(model):
    wrapped = add_lora(copy.deepcopy(model), r=2, alpha=4.0, dropout=0.1, targets="all-linear", seed=0)
    return wrapped, make_optimizer(wrapped, weight_decay=0.1)


def advance(wrapped, optimizer, progress, steps):
    optimizer_settings = OptimizerSettings(0.01, "cosine", 2, 1.0, total_steps=progress.step + steps)
    plan = Plan(len(EXAMPLES), 2, 1, seed=0)
    events = train(wrapped, optimizer, EXAMPLES, plan, optimizer_settings, pad_id=0, first_step=progress.step)
    return Progress((*progress.steps, *events), ((0, 5.5),))


def state(wrapped, optimizer):
    trained = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    for name, parameter in wrapped.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            trained[f"{name}/{moment}"] = value.clone()
    return trained


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def saved(model, directory):
    """A run after three steps, its state, and the folder it lies in."""
    wrapped, optimizer = fresh(model)
    progress = advance(wrapped, optimizer, Progress(), 3)
    save_checkpoint(directory, wrapped, optimizer, progress, MADE_OF)
    return progress, state(wrapped, optimizer), directory.root / "checkpoints" / "step-000003"


def test_everything_comes_back_bit_for_bit(model, directory, saved):
    progress, expected, _ = saved
    wrapped, optimizer = fresh(model)
    assert resume(directory, wrapped, optimizer, MADE_OF) == progress
    found = state(wrapped, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name.endswith("/exp_avg_sq") for name in found)


def test_without_a_checkpoint_nothing_is_changed(model, directory):
    wrapped, optimizer = fresh(model)
    before = state(wrapped, optimizer)
    assert resume(directory, wrapped, optimizer, MADE_OF) == Progress()
    assert all(torch.equal(value, before[name]) for name, value in state(wrapped, optimizer).items())


def test_the_last_two_are_kept(model, directory):
    wrapped, optimizer = fresh(model)
    progress = Progress()
    for _ in range(4):
        progress = advance(wrapped, optimizer, progress, 1)
        save_checkpoint(directory, wrapped, optimizer, progress, MADE_OF)
    assert sorted(os.listdir(directory.root / "checkpoints")) == ["step-000003", "step-000004"]


def test_the_newest_is_resumed_whatever_else_lies_there(model, directory, saved):
    wrapped, optimizer = fresh(model)
    later = advance(wrapped, optimizer, Progress(), 12)
    save_checkpoint(directory, wrapped, optimizer, later, MADE_OF)
    (directory.root / "checkpoints" / "step-by-step").mkdir()
    (directory.root / "checkpoints" / ".unfinished-step-000099").mkdir()
    assert resume(directory, *fresh(model), MADE_OF).step == 12


def test_files_are_safetensors_and_json(saved):
    _, _, folder = saved
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, OPTIMIZER, STATE]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (MADE_OF | {"lr": 0.02}, "lr was 0.01 and is 0.02"),
        (MADE_OF | {"lr": 0.02, "data": "xyz"}, "lr was 0.01 and is 0.02; data was 'abc' and is 'xyz'"),
        (MADE_OF | {"new": 1}, "new was None and is 1"),
        ({k: v for k, v in MADE_OF.items() if k != "lr"}, "lr was 0.01 and is None"),
    ],
)
def test_another_run_is_not_resumed(model, directory, saved, now, message):
    with pytest.raises(ConfigError, match=message):
        resume(directory, *fresh(model), now)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["cut", "flipped", "absent"])
def test_damage_is_refused_and_named(model, directory, saved, name, damage):
    file = saved[2] / name
    content = bytearray(file.read_bytes())
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x80
        file.write_bytes(content)
    with pytest.raises(StorageError, match="step-000003") as caught:
        resume(directory, *fresh(model), MADE_OF)
    assert name in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1}', "null", '{"format": 2}'])
def test_a_state_that_is_none_is_refused(model, directory, saved, text):
    (saved[2] / STATE).write_text(text)
    with pytest.raises(StorageError, match=r"damaged: state.json is not what was written; delete it to go on"):
        resume(directory, *fresh(model), MADE_OF)


def rewrite(folder, change):
    state = json.loads((folder / STATE).read_text())
    change(state)
    (folder / STATE).write_text(json.dumps(state))


def test_another_format_is_refused(model, directory, saved):
    rewrite(saved[2], lambda state: state.update(format=2))
    with pytest.raises(StorageError, match="format 2; this version reads format 1 alone"):
        resume(directory, *fresh(model), MADE_OF)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04N.", "not a whole safetensors file"),
        (save({"gone/exp_avg": torch.zeros(2)}), "moments of gone, which the model does not have"),
    ],
)
def test_a_forged_optimizer_is_refused(model, directory, saved, content, message):
    import hashlib

    (saved[2] / OPTIMIZER).write_bytes(content)
    rewrite(saved[2], lambda state: state["sha256"].update({OPTIMIZER: hashlib.sha256(content).hexdigest()}))
    with pytest.raises(StorageError, match=message):
        resume(directory, *fresh(model), MADE_OF)
