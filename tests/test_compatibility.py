"""The tables of what works with what are those that their script makes, as far as a few rows tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from obfuscatune.enclave.local_worker import LocalWorker
from scripts import what_works

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/compatibility.md").read_text("utf-8")


def rows(marker: str) -> dict[str, str]:
    """Name and verdict as the page has them."""
    match = re.search(rf"<!-- {marker} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert match is not None
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", match[1], re.MULTILINE))


def test_every_name_has_its_row() -> None:
    assert tuple(rows("architectures")) == what_works.MODEL_TYPES
    assert tuple(rows("methods")) == tuple(what_works.METHODS)


@pytest.mark.parametrize("model_type", ["mixtral", "mamba"])
@pytest.mark.filterwarnings("ignore")
def test_architectures(model_type: str, worker: LocalWorker) -> None:
    assert what_works.try_architecture(model_type, worker.address) == rows("architectures")[model_type]


@pytest.mark.parametrize("method", ["LoRA with ranks by layer", "DoRA"])
@pytest.mark.filterwarnings("ignore")
def test_methods(method: str, worker: LocalWorker) -> None:
    assert what_works.try_method(method, worker.address) == rows("methods")[method]


def test_the_readme_has_the_summary() -> None:
    assert what_works.summary(rows("architectures"), rows("methods")) in (ROOT / "README.md").read_text("utf-8")
