"""Containerfiles copy files that exist, install by hash alone, run as nobody, and run commands that exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.command_lines import check_command_line

ROOT = Path(__file__).parents[2]
NAMES = ("worker", "enclave")


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction and what follows it."""
    text = (ROOT / "deploy" / f"Containerfile.{name}").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def last(name: str, instruction: str) -> str:
    return [rest for word, rest in instructions(name) if word == instruction][-1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_exists(name: str) -> None:
    copied = [rest.split()[:-1] for word, rest in instructions(name) if word == "COPY" and "--from" not in rest]
    assert copied
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_installed_but_by_hash(name: str) -> None:
    installs = [
        part for word, rest in instructions(name) if word == "RUN" for part in rest.split("&&") if "install" in part
    ]
    assert len(installs) >= 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "--no-index" in install, install


@pytest.mark.parametrize("name", NAMES)
def test_images_are_given_and_not_named_by_a_tag(name: str) -> None:
    assert [rest.split()[0] for word, rest in instructions(name) if word == "FROM"] == ["${BUILDER}", "${RUNTIME}"]
    assert not any("=" in rest for word, rest in instructions(name) if word == "ARG"), "an argument with a default"


@pytest.mark.parametrize("name", NAMES)
def test_nobody_runs_it_without_a_shell(name: str) -> None:
    words = [word for word, _ in instructions(name)]
    assert last(name, "USER") == "65532:65532"
    assert "RUN" not in words[words.index("USER") :]
    started = json.loads(last(name, "ENTRYPOINT")) + json.loads(last(name, "CMD"))
    health = json.loads(last(name, "HEALTHCHECK").partition("CMD")[2])
    assert started[0] == health[0] == "/usr/bin/python3.11"
    compile(health[-1], "healthcheck", "exec")
    check_command_line(started[1:])


@pytest.mark.parametrize("name", ["build", *NAMES])
def test_lists_are_of_the_versions_that_are_tested(name: str) -> None:
    """Each entry, hashes included, is one of requirements/dev.txt."""
    entries = re.compile(r"^[a-z].*?(?=^[a-z#]|\Z)", re.MULTILINE | re.DOTALL)
    tested = {it.strip() for it in entries.findall((ROOT / "requirements/dev.txt").read_text("utf-8"))}
    found = [it.strip() for it in entries.findall((ROOT / f"requirements/{name}.txt").read_text("utf-8"))]
    assert len(found) >= 5
    assert [it.partition(" ")[0] for it in found if it not in tested] == []


def test_the_enclave_has_what_the_package_needs() -> None:
    """Each dependency, and each of the extra `service`; torch is given by its own hash."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {
        Requirement(it).name.lower() for it in project["dependencies"] + project["optional-dependencies"]["service"]
    }
    listed = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/enclave.txt").read_text("utf-8"), re.MULTILINE)
    assert needed - {"torch"} <= set(listed)
