"""What the README tells people to type is run as it is written."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from obfuscatune.cli.app import make_app
from obfuscatune.cli.app import run as command_line
from obfuscatune.training.recipe import ALIASES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("obfuscatune ")]


def test_the_python_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = blocks("python")
    code_lines = [line for line in example.splitlines() if line.strip()]
    assert len(code_lines) <= 15
    (tmp_path / "example.py").write_text(example, "utf-8")
    command = [sys.executable, "-W", "ignore", "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "It was late in the evening when" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_shell_commands_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process: that the command starts as one of its own, tests/cli/test_app.py sees."""
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"Question: who is number {n}?\nAnswer:", "completion": f" Ann{n}"} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    assert len(commands()) >= 6
    for command in commands():
        code = command_line(shlex.split(command)[1:])
        assert code == 0, f"{command}\n{capfd.readouterr().err}"


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_to_files(target: str) -> None:
    assert (ROOT / target).exists()


def options_of(command: Any) -> set[str]:
    """Every option of a command and of those beneath it."""
    context = click.Context(command)
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        found |= options_of(command.resolve_command(context, [name])[1])  # which imports it
    return found


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "docs/finetune.md", "docs/worker.md", "docs/reproduce.md"),
        *(f"docs/guide/{role}.md" for role in ("provider", "owner", "operator", "researcher")),
    ],
)
def test_options_that_are_named_exist(page: str) -> None:
    declared = {"--help", "--debug", "--version", "--install-completion", "--logdir"} | options_of(make_app())
    declared |= {f"--{name.replace('_', '-')}" for name in ALIASES}
    named = set(re.findall(r"--[a-z][a-z-]*", (ROOT / page).read_text("utf-8")))
    assert named <= declared


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
