"""docs/glossary.md against the code: no word that was given up comes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "slot": r"__slots__|slots=True",
    "arena": r"M_ARENA_MAX|MALLOC_ARENA_MAX",
    "panel": r"rich_help_panel|option\.panel|panel: str|panel=",
}
"""Names of others."""


def retired() -> list[str]:
    """The first column of the glossary's last table."""
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8").split("## Words that are not used any more")[1]
    words = re.findall(r"^\| ([a-z]+) \|", text, re.MULTILINE)
    return [word for word in words if word != "not"]


def test_there_are_some() -> None:
    assert {"arena", "spool"} <= set(retired())


@pytest.mark.parametrize("word", retired())
def test_no_retired_word_is_in_the_code(word: str) -> None:
    pattern = re.compile(rf"(?i)(?<![a-z]){word}s?(?![a-z])")
    found = []
    for folder in ("src", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".py", ".cpp", ".hpp", ".h"):
                continue
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                if pattern.search(re.sub(ALLOWED.get(word, r"(?!)"), "", line)):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
