"""The commands warn, in one line, of a model that looks like a fine-tune of a published one."""

import io
import shutil
import sys

import pytest

from obfuscatune.assets import tiny_model_path

LINE = "warning: this looks like a fine-tune of acme/base-7b, which its README.md names: under profile private, "


@pytest.fixture
def tuned_model(tmp_path):
    """The embedded model with a card that names a base model."""
    folder = shutil.copytree(tiny_model_path(), tmp_path / "model")
    (folder / "README.md").write_text("---\nbase_model: acme/base-7b\n---\n")
    return folder


@pytest.fixture
def commands(worker, notes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    to = ("--worker", worker.address)
    return {
        "generate": ("generate", "--prompt", "It was", "--max-new-tokens", 2, *to),
        "chat": ("chat", "--max-new-tokens", 2, *to),
        "finetune": ("finetune", "--data", notes, "--out", tmp_path / "run", "--max-steps", 1, *to),
        "evaluate": ("evaluate", "--data", notes, "--limit", 1, *to),
        "inspect": ("inspect",),
    }


@pytest.mark.parametrize("name", ["generate", "chat", "finetune", "evaluate", "inspect"])
def test_each_command_says_it_once(obfuscatune, commands, tuned_model, name):
    ran = obfuscatune(*commands[name], "--model", tuned_model)
    assert ran.code == 0, ran.stderr
    assert "fine-tune of" not in ran.stdout
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("warning: ")]
    assert line.startswith(LINE)
    assert line.endswith("--base closed says that the base model's weights were never public")


@pytest.mark.parametrize("name", ["generate", "inspect"])
def test_a_closed_base_and_the_embedded_model_need_no_warning(obfuscatune, commands, tuned_model, name):
    for options in ("--model", tuned_model, "--base", "closed"), ():
        ran = obfuscatune(*commands[name], *options)
        assert ran.code == 0, ran.stderr
        assert "warning" not in ran.stderr


def test_a_public_base_is_said_to_be_one(obfuscatune, commands):
    ran = obfuscatune(*commands["inspect"], "--base", "public")
    assert "warning: the base model is public: under profile private, " in ran.stderr
    refused = obfuscatune(*commands["inspect"], "--base", "open")
    assert (refused.code, refused.stderr.splitlines()[-1]) == (
        2,
        "error: base: expected closed or public, found 'open'",
    )
