"""Texts stand in message files, what others wrote in files that are known by digest; pages are small and quick."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import obfuscatune.console
from obfuscatune.console import pages
from obfuscatune.errors import ConfigError
from tests.console.conftest import Served

ROOT = Path(obfuscatune.console.__file__).parent
TEMPLATES = sorted((ROOT / "templates").rglob("*.html"))
NO_LANGUAGE = (": there is no such folder", ": cannot listen there", " is missing", "private, max-age=")
"""How literals begin that are headers, or are told in a terminal alone."""
DYNAMIC = ("state.", "link.", "check.", "status.", "model.", "export.", "use.", "turn.", "setting.", "problem.", "nav.")
DYNAMIC += (
    "frame.role.",
    "frame.local.",
    "standing.",
    "enclave.verdict.",
    "enclave.meaning.",
    "operator.role.",
    "version.",
    "done.",
    "guard.",
)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda it: it.name)
def test_no_language_stands_in_a_template(template: Path) -> None:
    text = re.sub(r"\{#.*?#\}", "", template.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"\{%.*?%\}|\{\{.*?\}\}", "", text, flags=re.DOTALL)
    for attribute in ("aria-label", "title", "alt", "placeholder", "hx-confirm"):
        for found in re.findall(rf'\b{attribute}="([^"]*)"', text):
            assert not re.search(r"[A-Za-z]", found), found
    shown = re.sub(r"<code>obfuscatune [a-z ]+</code>", "", text)
    shown = re.sub(r"<[^>]*>", " ", shown)
    assert not re.search(r"[A-Za-z]{2,}", shown), re.findall(r"[A-Za-z]{2,}", shown)


def test_every_text_that_is_named_is_there_and_no_other() -> None:
    sources = [it.read_text("utf-8") for it in (*TEMPLATES, *ROOT.glob("*.py"))]
    named = {key for it in sources for key in re.findall(r"""\b(?:t|text)\(["']([a-z_.]+)["'][,)]""", it)}
    known = set(pages.messages())
    assert named <= known, named - known
    unused = {it for it in known - named if not it.startswith(DYNAMIC)}
    whole = "".join(sources)
    assert not {it for it in unused if it not in whole and it.rpartition(".")[2] not in whole}


def test_no_language_stands_in_the_code() -> None:
    """What a page shows comes of a message file: no literal of more than a word, but for headers and terminals."""
    for source in sorted(ROOT.glob("*.py")):
        tree = ast.parse(source.read_text("utf-8"))
        documentation = {id(it.value) for it in ast.walk(tree) if isinstance(it, ast.Expr)}
        for it in ast.walk(tree):
            if isinstance(it, ast.Constant) and isinstance(it.value, str) and id(it) not in documentation:
                is_language = re.search(r"[A-Za-z]{2,},? [a-z]{2,}", it.value) is not None
                assert not is_language or it.value.startswith(NO_LANGUAGE), f"{source.name}: {it.value!r}"


def test_no_language_stands_in_a_script() -> None:
    for source in (ROOT / "static").glob("*.js"):
        code = re.sub(r"(?m)^\s*//.*$|  // .*$", "", source.read_text("utf-8"))
        for literal in re.findall(r'"([^"\n]*)"|`([^`]*)`', code):
            assert not re.search(r"[A-Z][a-z]+,? [a-z]{2,}", "".join(literal)), literal


def test_a_text_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError):
        pages.text("no.such")
    with pytest.raises(ConfigError):
        pages.text("common.ago")


def test_what_others_wrote_is_what_was_reviewed() -> None:
    folder = ROOT / "static" / "vendor"
    digests = dict(reversed(line.split()) for line in (folder / "DIGESTS").read_text("utf-8").splitlines())
    assert set(digests) == {it.name for it in folder.iterdir()} - {"DIGESTS"}
    for name, digest in digests.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_no_style_and_no_script_stands_in_a_page() -> None:
    for template in TEMPLATES:
        text = template.read_text("utf-8")
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\bsrc=)|https?://", text), template.name
        assert "|safe" not in text.replace(" ", "") and "autoescape" not in text


def test_the_style_sheet_loads_nothing_and_has_both_schemes() -> None:
    sheet = pages.style_sheet().decode()
    assert "url(" not in sheet and "@import" not in sheet
    assert "prefers-color-scheme: dark" in sheet


def test_the_first_page_is_small_and_quick(owner_served: Served) -> None:
    browser = owner_served.browser
    began = time.process_time()
    page = browser.get("/")
    spent = time.process_time() - began
    loaded = [owner_served.origin + it for it in re.findall(r'(?:src|href)="(/[^"]+/static/[^"]+)"', page.text)]
    assert len(loaded) >= 4
    total = len(page.content) + sum(len(browser.get(it).content) for it in set(loaded))
    assert total < 200_000
    assert spent < 1.0  # seconds of CPU, of server and client together


def test_consoles_start_without_torch() -> None:
    code = (
        "import time, sys, resource; import obfuscatune.console.owner, obfuscatune.console.provider, uvicorn;"
        "from obfuscatune.console.pages import environment, style_sheet; style_sheet();"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_utime;"
        "print('torch' in sys.modules, 'transformers' in sys.modules, used)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    torch, transformers, seconds = done.stdout.split()
    assert (torch, transformers) == ("False", "False")
    assert float(seconds) < 3.0  # of CPU; about 1 on a quiet machine


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3700, "1 h 1 min"), (90000, "1 d 1 h"), (None, "–"), (-1, "–")],
)
def test_spans(value: float | None, shown: str) -> None:
    assert pages.format_span(value) == shown


def test_numbers_that_are_none_are_dashes() -> None:
    for shown in (pages.format_count, pages.format_bytes, pages.format_time, pages.format_ago):
        assert shown(None) == shown("<b>") == shown(True) == "–"
    assert pages.format_time(1e18) == "–"


def test_digests_in_a_text_are_cut() -> None:
    assert pages.brief(f"expected {'ab' * 32}, found {'cd' * 32}.") == "expected abababababab…, found cdcdcdcdcdcd…."
    assert pages.brief("a decade of 1234567890") == "a decade of 1234567890"
