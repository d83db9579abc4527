"""The pages and files about the project itself say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import obfuscatune
from obfuscatune import __version__

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "examples/README.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / page).read_text("utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_contributing_names_files_that_exist() -> None:
    paths = re.findall(r"`((?:src|tests|docs)/[\w/.]+)`", CONTRIBUTING)
    assert len(paths) >= 5
    for path in paths:
        assert (ROOT / path.replace("NAME", "__init__")).exists(), path


def test_contributing_names_what_the_code_has() -> None:
    code = "".join(file.read_text("utf-8") for folder in ("src", "tests") for file in (ROOT / folder).rglob("*.py"))
    names = set(re.findall(r"`(_?[A-Za-z]+(?:_[a-z]+)+|[A-Z][A-Z_]+|[A-Z]\w+Transform)`", CONTRIBUTING)) - {"NAME"}
    assert len(names) >= 8
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", CONTRIBUTING, re.MULTILINE))
    for target in filter(None, (name for pair in targets for name in pair)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_decision_has_its_row_and_heading() -> None:
    pages = sorted(path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    rows = re.findall(r"^\| \[(\d+)\]\(([^)]+)\) \| ([^|]+) \|", (ROOT / "docs/adr/README.md").read_text("utf-8"), re.M)
    assert [name for _, name, _ in rows] == pages
    for number, name, title in rows:
        heading = (ROOT / "docs/adr" / name).read_text("utf-8").partition("\n")[0]
        assert re.fullmatch(rf"# 0*{number}\. {re.escape(title.strip())}", heading), heading


def test_actions_are_pinned_by_commit() -> None:
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values()
        used = [step["uses"] for job in jobs for step in job.get("steps", ()) if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used), used


def test_the_version_stands_where_releases_are_told_of() -> None:
    assert __version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference/api.md").read_text("utf-8")
    shown = re.findall(r"^::: obfuscatune\.(\w+)$", page, re.MULTILINE)
    assert sorted([*shown, "ObfuscaTuneError", "__version__", "errors"]) == sorted(
        obfuscatune.__all__
    )  # errors have their page
