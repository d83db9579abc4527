"""A real browser before real consoles, a real service and real workers. `make test-browser` sets it up and runs it.

Every page that `Eyes.look` sees is held by axe-core, in light and dark, at the width of a phone and of a desk, and
leaves screenshots in browser-out/.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.parties.world import World, _start

OUT = Path(__file__).parents[2] / "browser-out"
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
WIDTHS = {"phone": 390, "desktop": 1280}
PATIENCE_MS = 180_000


@dataclass
class Eyes:
    """Looks at pages, and gathers what is wrong with them."""

    axe: Any
    findings: list[str] = field(default_factory=list)

    def look(self, page: Any, name: str, *, hurries: bool = False) -> None:
        """Screenshots; no finding of axe-core; nothing wider than the window.

        Args:
            hurries: Has axe-core look at one width: what the page shows does not last.
        """
        before = page.viewport_size
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width_name, width in WIDTHS.items():
                page.set_viewport_size({"width": width, "height": 844 if width < 500 else 900})
                page.wait_for_timeout(150)  # the chart is drawn anew in the next frame
                page.screenshot(path=OUT / f"{name}-{width_name}-{scheme}.png", full_page=True)
                wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                if wide > 0:
                    self.findings.append(f"{name}: {wide} pixels too wide at {width}")
                if hurries and width_name != "desktop":
                    continue
                found = self.axe.run(page)
                if found.violations_count:
                    self.findings.append(f"{name}, {scheme}, {width}\n{found.generate_report()}")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(before)


@pytest.fixture
def eyes() -> Iterator[Eyes]:
    """Fails the test at its end, with all that was found."""
    from axe_playwright_python.sync_playwright import Axe

    OUT.mkdir(exist_ok=True)
    looking = Eyes(Axe())
    yield looking
    assert not looking.findings, "\n".join(looking.findings)


@pytest.fixture(scope="session")
def launched() -> Iterator[Callable[[], Any]]:
    """Gives the browser of all tests, or another where that one has crashed: it takes no other test with it."""
    from playwright.sync_api import sync_playwright

    if shutil.which(CHROMIUM) is None:
        pytest.fail(f"there is no {CHROMIUM}: apt-get install chromium")  # whoever chose these tests wants them run
    browsers: list[Any] = []

    def launch() -> Any:
        if not browsers or not browsers[-1].is_connected():
            browsers.append(running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS))
        return browsers[-1]

    with sync_playwright() as running:
        yield launch
        for browser in browsers:
            browser.close()


@pytest.fixture
def chromium(launched: Callable[[], Any]) -> Any:
    """A browser that runs."""
    return launched()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[[str], Any]]:
    """Opens a console's link in a browser of its own; fails where a page's own policy or script complains."""
    with ExitStack() as stack:
        complaints: list[str] = []

        def heard(message: Any) -> None:
            expected = ("Failed to load resource", "htmx:sendError", "htmx:afterRequest")  # consoles end before pages
            if message.type == "error" and not any(it in message.text for it in expected):
                complaints.append(message.text)

        def open_link(link: str) -> Any:
            context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            page.on("console", heard)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            hosts: set[str] = set()
            page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            page.goto(link)
            page.wait_for_url(link.split("/enter#")[0] + "/")
            stack.callback(lambda: _one(hosts))
            return page

        yield open_link
    assert not complaints


def _one(hosts: set[str]) -> None:
    assert len(hosts) == 1, f"pages asked other hosts: {hosts}"


@contextmanager
def console(world: World, role: str, party: str, *more: str) -> Iterator[str]:
    """The console of a party, as a process; its link."""
    log = world.root / f"console-{party}.log"
    process = _start(role, "console", *map(str, world.options(party)), *more, "--port", "0", log=log)
    try:
        link = process.stdout.readline().strip()
        assert link.startswith("http://127.0.0.1:"), log.read_text()
        yield link
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15), log.read_text()
        process.stdout.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), profile="guarded")
    with made.running():
        made.grant("--export", "provider-consent", "--tokens", "200000")
        yield made
