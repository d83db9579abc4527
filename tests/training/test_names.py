"""Hugging Face's names: one table, the same in Python, in run files and, in tests/cli, on the command line."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from pydantic import ValidationError
from transformers import TrainingArguments

from obfuscatune.errors import ConfigError
from obfuscatune.training.recipe import ALIASES, Recipe, load_recipe, resolve_names

GUIDE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")

# Names of TRL, of example scripts and of transformers' callbacks, which are no fields of these two classes.
ELSEWHERE = {
    "early_stopping_patience",
    "lora_rank",
    "lora_target_modules",
    "max_seq_length",
    "model_name_or_path",
    "torch_dtype",
    "train_file",
    "validation_file",
}

THEIRS = {
    "output_dir": "runs/a",
    "learning_rate": "3e-4",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "steps",
    "save_steps": 10,
    "save_total_limit": 3,
    "logging_steps": 7,
    "seed": 42,
    "report_to": "tensorboard",
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
    "target_modules": "q_proj,v_proj",
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "r": 8,
    "max_length": 128,
}
OURS = {
    "out": Path("runs/a"),
    "lr": 3e-4,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "clip": 0.5,
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 2,
    "eval_every": 5,
    "checkpoint_every": 10,
    "checkpoints_kept": 3,
    "logging_steps": 7,
    "seed": 42,
    "tensorboard": True,
    "load_best": True,
    "patience": 3,
    "lora_targets": ("q_proj", "v_proj"),
    "lora_alpha": 16.0,
    "lora_dropout": 0.1,
    "lora_r": 8,
    "max_length": 128,
}
FILES = {"data": "train.jsonl", "eval": "held.jsonl"}


def test_every_alias_is_a_name_there_and_a_field_here():
    there = {field.name for kind in (TrainingArguments, LoraConfig) for field in dataclasses.fields(kind)}
    assert ALIASES.keys() - there == ELSEWHERE
    assert {alias.field for alias in ALIASES.values()} <= Recipe.model_fields.keys()
    assert not ALIASES.keys() & Recipe.model_fields.keys()


def test_python_takes_their_names():
    recipe = Recipe(**FILES, **THEIRS)
    assert {name: getattr(recipe, name) for name in OURS} == OURS
    assert recipe == Recipe(**FILES, **OURS)


def test_a_run_file_takes_their_names_and_the_command_line_overrides_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(FILES | THEIRS))
    assert load_recipe(file, {}) == Recipe(**FILES, **OURS)
    assert load_recipe(file, {"lr": 0.5}).lr == load_recipe(file, {"learning_rate": "0.5"}).lr == 0.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eval_strategy": "epoch"}, {"eval_every": "epoch"}),
        ({"eval_strategy": "no"}, {}),
        ({"eval_strategy": False}, {}),  # YAML's reading of a bare `no`
        ({"save_strategy": "epoch"}, {"checkpoint_every": "epoch"}),
        ({"report_to": "none"}, {"tensorboard": False}),
        ({"lr": 1e-4, "learning_rate": "0.0001"}, {"lr": 1e-4}),
        ({"learning_rate": 2, "other": 3}, {"lr": 2, "other": 3}),
    ],
)
def test_values_are_translated(given, expected):
    assert resolve_names(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 1e-4, "learning_rate": 2e-4}, "lr and learning_rate are one setting, yet 0.0001 and 0.0002 are given"),
        ({"r": 4, "lora_r": 8}, "r and lora_r are one setting, yet 4 and 8 are given"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_strategy and eval_steps are one setting"),
        ({"eval_strategy": "sometimes"}, "eval_strategy: expected no or steps or epoch, found 'sometimes'"),
        ({"save_strategy": "no"}, "save_strategy: expected steps or epoch, found 'no'"),
        ({"report_to": "wandb"}, "report_to: expected none or tensorboard, found 'wandb'"),
    ],
)
def test_contradictions_and_what_we_have_not_are_refused_by_name(tmp_path, given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(None, FILES | given)
    with pytest.raises(ValidationError, match=re.escape(message)):
        Recipe(**FILES, **given)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(FILES | given, sort_keys=False))
    with pytest.raises(ConfigError, match=re.escape(f"run.yaml: {message}")):
        load_recipe(file, {})


def test_the_guide_shows_the_whole_table():
    section = GUIDE.partition("## Names from Hugging Face")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section, re.MULTILINE)
    assert dict(rows) == {name: alias.field for name, alias in ALIASES.items()}
