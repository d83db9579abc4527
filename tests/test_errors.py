"""The tree of errors is the one that its page shows, and each error says what to do."""

from __future__ import annotations

import re

from obfuscatune import errors
from obfuscatune.errors import ObfuscaTuneError


def tree(root: type[Exception]) -> dict[str, str]:
    """Every class of the module beneath `root`, and its parent's name."""
    own = [kind for kind in root.__subclasses__() if kind.__module__ == errors.__name__]
    return {kind.__name__: root.__name__ for kind in own} | {k: v for kind in own for k, v in tree(kind).items()}


def drawn() -> dict[str, str]:
    """The same as the module's docstring draws it."""
    parents: list[str] = ["ObfuscaTuneError"]
    found = {}
    for indent, name in re.findall(r"^ {4}([│ ]*)[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4 + 1
        parents[depth:] = [name]
        found[name] = parents[depth - 1]
    return found


def test_the_tree_is_drawn_as_it_is() -> None:
    assert len(drawn()) > 20
    assert drawn() == tree(ObfuscaTuneError)


def test_each_error_says_what_to_do() -> None:
    for name in ("ObfuscaTuneError", *tree(ObfuscaTuneError)):
        text = getattr(errors, name).__doc__ or ""
        assert re.search(r"\n    What to do:\n        \w", text), name
