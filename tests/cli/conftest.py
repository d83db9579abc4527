"""The command line called in this process, and what it needs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.cli import app


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The JSON document that is all of stdout."""
        return json.loads(self.stdout)


@pytest.fixture
def obfuscatune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs a command line; what the process writes at any level counts as its output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = app.run([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Private records."""
    path = tmp_path / "notes.jsonl"
    owners = ("Lily", "Tim", "Mom", "Dad", "Sue", "Max", "The cat", "The dog", "The bird", "The boy", "Tom", "Anna")
    things = ("ball", "hat", "tree", "park", "cake", "car", "box", "bed", "sun", "book", "toy", "house")
    lines = [{"prompt": f"{a} has the", "completion": f" {b}."} for a, b in zip(owners, things, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
