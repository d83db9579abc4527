"""Command lines in files of deploy/, held against the programs that they call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from obfuscatune.cli.app import _COMMANDS, make_app
from obfuscatune.worker.options import parse_arguments


def check_command_line(arguments: Sequence[str]) -> None:
    """Fail unless `arguments`, what follows `python`, is a command of ours with options that exist."""
    words = [re.sub(r"\$\{?\w+\}?", "/somewhere", word) for word in arguments]
    at = words.index("-m")
    assert set(words[:at]) <= {"-P", "-I"}
    module, *rest = words[at + 1 :]
    if module == "obfuscatune.worker":
        parse_arguments(rest)
        return
    assert module == "obfuscatune"
    name, *options = rest
    if name not in _COMMANDS:
        pytest.skip(f"the command {name} is not there")
    command: Any = make_app()
    context = command.make_context("obfuscatune", [name, *options], resilient_parsing=True)
    _, found, _ = command.resolve_command(context, [name])
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in options if word.startswith("--")} <= known
