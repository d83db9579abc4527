"""A console by the keyboard alone, and how soon its first page is there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.test_attacks import browser_of
from tests.console.conftest import Served
from tests.console.conftest import owner_console_served as owner_console_served
from tests.console.conftest import owner_served as owner_served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
MOST_SECONDS = 1.0
MOST_BYTES = 200_000
LOADS = 30
OUTLINE = "(({ outlineStyle, outlineWidth }) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
MENU = ["Enclave", "Data", "Jobs", "Compare", "Log", "Sign out"]
ACTIVE = """(() => { const it = document.activeElement;
    return it === document.body ? "BODY" : it.innerText?.trim() || it.id || it.tagName })()"""


def test_the_first_page_is_there_within_a_second(chromium: Any, owner_served: Served) -> None:
    """From the navigation's beginning to the load event, and all that it fetched, with an empty cache each time.

    One load that is quick enough proves it; more are tried where others use the machine meanwhile.
    """
    with browser_of(chromium, owner_served) as page:
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.setCacheDisabled", {"cacheDisabled": True})
        seconds, sizes = [], []
        for _ in range(LOADS):
            page.goto(owner_served.base + "/", wait_until="load")
            page.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
            seconds.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
            entries = "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
            sizes.append(page.evaluate(f"{entries}.map(it => it.transferSize).reduce((a, b) => a + b)"))
            if len(seconds) >= 3 and min(seconds) < MOST_SECONDS:
                break
        print(f"first page: {min(seconds):.3f} s of {[f'{it:.3f}' for it in seconds]}, {max(sizes):,} bytes")
        assert min(seconds) < MOST_SECONDS
        assert 20_000 < max(sizes) < MOST_BYTES


def test_everything_is_reached_by_the_keyboard_and_seen_there(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page:
        page.keyboard.press("Tab")
        assert page.evaluate(ACTIVE) == "Skip to content"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.reload()
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            outline = page.evaluate(OUTLINE)
            name = page.evaluate(ACTIVE)
            if name == "BODY":
                break
            reached.append(name)
            assert outline[0] != "none" and outline[1] != "0px", f"{name}: nobody sees where the keyboard is"
        assert [it for it in reached if it in MENU] == MENU
        assert {"Verify again", "Verification document"} <= set(reached)


def test_a_file_is_chosen_and_a_question_is_asked_by_the_keyboard(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page:
        page.goto(f"{owner_served.base}/data")
        page.focus("#file")
        with page.expect_file_chooser():
            page.keyboard.press("Space")
        page.goto(f"{owner_served.base}/compare")
        page.focus("#prompt")
        page.keyboard.type("Who?")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "ask"
        page.keyboard.press("Enter")
        page.wait_for_selector("#answers-tuned output:not([aria-busy])")
