"""Options under their names in Hugging Face's libraries, from the environment, and as a shell completes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from obfuscatune.cli.options import ENVIRONMENT, PROFILES
from obfuscatune.enclave.profiles import PRESETS
from obfuscatune.training.recipe import ALIASES, Recipe

VALUES = {
    "learning_rate": ("3e-4", "lr", 3e-4),
    "lr_scheduler_type": ("constant_with_warmup", "schedule", "constant"),
    "max_grad_norm": ("0.5", "clip", 0.5),
    "per_device_train_batch_size": ("4", "batch_size", 4),
    "gradient_accumulation_steps": ("2", "accumulation", 2),
    "num_train_epochs": ("1.0", "epochs", 1),
    "eval_strategy": ("epoch", "eval_every", "epoch"),
    "save_steps": ("10", "checkpoint_every", 10),
    "save_total_limit": ("3", "checkpoints_kept", 3),
    "target_modules": ("q_proj,v_proj", "lora_targets", ["q_proj", "v_proj"]),
    "r": ("2", "lora_r", 2),
    "max_seq_length": ("64", "max_length", 64),
    "report_to": ("none", "tensorboard", False),
}


@pytest.fixture
def recipe(obfuscatune, stories260k, notes, tmp_path):
    """Runs one step of a plain `finetune`; returns the recipe that was written down."""

    def run(*options):
        out = tmp_path / "run"
        ran = obfuscatune(
            *("finetune", "--plain", "--model", stories260k, "--data", notes, "--out", out, "--max-steps", 1), *options
        )
        assert ran.code == 0, ran.stderr
        return yaml.safe_load((out / "recipe.yaml").read_text())

    return run


@pytest.mark.parametrize("dash", ["-", "_"])
def test_their_names_are_options_with_either_dash(recipe, notes, dash):
    theirs = [text for name, (value, _, _) in VALUES.items() for text in (f"--{name.replace('_', dash)}", value)]
    written = recipe(
        f"--validation{dash}file", notes, f"--lora{dash}alpha", 8, f"--gradient{dash}checkpointing", *theirs
    )
    assert {field: written[field] for _, field, _ in VALUES.values()} == {
        field: value for _, field, value in VALUES.values()
    }
    assert (written["eval"], written["lora_alpha"], written["gradient_checkpointing"]) == (str(notes), 8.0, True)


@pytest.mark.parametrize("name", ALIASES)
def test_every_name_of_the_table_is_an_option(obfuscatune, name):
    ran = obfuscatune("finetune", f"--{name}")
    assert f"Option '--{name.replace('_', '-')}' requires an argument" in ran.stderr


def test_two_names_with_two_values_are_refused(obfuscatune, notes):
    ran = obfuscatune("finetune", "--data", notes, "--lr", "1e-3", "--learning-rate", "2e-3")
    assert ran.code == 2
    assert ran.stderr == "error: lr and learning_rate are one setting, yet 0.001 and '2e-3' are given: leave one out\n"


def test_the_environment_stands_for_options(obfuscatune, recipe, stories260k, monkeypatch, tmp_path):
    monkeypatch.setenv("OBFUSCATUNE_MODEL", str(stories260k))
    monkeypatch.setenv("OBFUSCATUNE_WORKER", "unix:/nowhere")
    monkeypatch.setenv("OBFUSCATUNE_DTYPE", "float64")
    ran = obfuscatune("generate", "--plain", "--prompt", "Once upon a time", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, "a worker that the environment names is not for a plain run"
    assert ran.document["text"].startswith(", there was")
    written = recipe()
    assert (written["dtype"], written["worker"]) == ("float64", None)
    refused = obfuscatune("generate", "--plain", "--worker", "unix:/elsewhere", "--prompt", "a")
    assert "--plain protects nothing" in refused.stderr


def test_a_run_file_says_more_than_the_environment_and_an_option_more_than_both(
    obfuscatune, recipe, notes, monkeypatch, tmp_path
):
    recipe()
    monkeypatch.setenv("OBFUSCATUNE_DTYPE", "float64")
    command = ("finetune", "--config", tmp_path / "run" / "recipe.yaml", "--data", notes)
    for options, dtype in ((), "float32"), (("--dtype", "bfloat16"), "bfloat16"):
        out = tmp_path / dtype
        assert obfuscatune(*command, *options, "--out", out).code == 0
        assert yaml.safe_load((out / "recipe.yaml").read_text())["dtype"] == dtype


def test_the_help_shows_every_field_of_the_recipe_with_its_default(obfuscatune):
    text = obfuscatune("finetune", "--help").stdout
    lines = {match[1].replace("-", "_"): match[0] for match in re.finditer(r"^│ --(\S+) .*", text, re.MULTILINE)}
    assert lines.keys() >= Recipe.model_fields.keys()
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, str | int | float | Path) and not isinstance(field.default, bool):
            told = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert f"[default: {told}]" in lines[name]


def test_help_names_the_variables(obfuscatune):
    text = obfuscatune("finetune", "--help").stdout
    assert all(variable in text for variable in ENVIRONMENT.values())


def test_an_unknown_variable_is_warned_of_in_one_line(obfuscatune, monkeypatch):
    monkeypatch.setenv("OBFUSCATUNE_WORKR", "unix:/x")
    ran = obfuscatune("--version")
    assert ran.code == 0
    assert ran.stderr == (
        "warning: OBFUSCATUNE_WORKR is set in the environment and is no variable of ours; "
        "did you mean OBFUSCATUNE_WORKER?\n"
    )


def complete(*words: str) -> list[str]:
    """What bash is told to offer for the last word."""
    line = " ".join(["obfuscatune", *words])
    done = subprocess.run(
        [sys.executable, "-c", "from obfuscatune.cli.app import main; main()"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"_OBFUSCATUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))},
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_profiles():
    assert complete("fine") == ["finetune"]
    assert complete("finetune", "--lora-t") == ["--lora-targets"]
    assert complete("generate", "--profile", "p") == [name for name in PROFILES if name.startswith("p")]
    assert complete("finetune", "--base", "c") == ["closed"]
    assert complete("finetune", "--data", "x") == [], "for files the shell's own completion is left to do it"


def test_the_profiles_that_are_completed_are_those_there_are():
    assert set(PROFILES) == set(PRESETS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(shell):
    done = subprocess.run(
        [sys.executable, "-m", "obfuscatune", "--show-completion", shell],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},  # no shell may have started the tests
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "_OBFUSCATUNE_COMPLETE" in done.stdout
