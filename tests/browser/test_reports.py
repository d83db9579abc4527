"""The reports of demo, audit, reproduce and bench, as their commands make them: one design, which axe-core passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import obfuscatune
from obfuscatune.reproduction import presets
from tests.browser.conftest import Eyes
from tests.parties.world import run
from tests.reproduction import made

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


def of_demo(folder: Path) -> Path:
    run("demo", "--quick", "--out", folder / "out", seconds=400)
    return folder / "out" / "report.html"


def of_audit(folder: Path) -> Path:
    run("audit", "--profile", "identity", "--attacker", "closed", "--seeds", "1", "--out", folder, seconds=800)
    return folder / "report.html"


def of_reproduce(folder: Path) -> Path:
    tiny, questions = made.model(folder / "model"), made.questions(folder / "questions")
    asked = {"preset": "smoke", "parts": ["accuracy", "error", "share"], "tasks": ["sciq"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "smoke", made.preset(tiny / "config.json"))
        return obfuscatune.reproduce(folder / "out", model=str(tiny), data_root=questions, **asked).report


def of_bench(folder: Path) -> Path:
    run("bench", "wire", "--out", folder, "--rows", "1", "--rows", "64")
    (page,) = folder.glob("*.html")
    return page


@pytest.mark.parametrize("make", [of_demo, of_audit, of_reproduce, of_bench], ids=lambda it: it.__name__[3:])
def test_a_report_is_of_the_same_design(
    make: Callable[[Path], Path], chromium: Any, eyes: Eyes, tmp_path: Path
) -> None:
    for name in ("model", "questions"):
        (tmp_path / name).mkdir()
    report = make(tmp_path)
    moved = tmp_path / "elsewhere.html"
    shutil.copy(report, moved)  # it needs nothing of its folder
    context = chromium.new_context()
    try:
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(moved.as_uri())
        assert page.locator("h1").count() == 1
        eyes.look(page, f"report-{make.__name__[3:]}")
        assert asked == [moved.as_uri()]
    finally:
        context.close()
