"""The README's picture of the console: a real service, real workers, a job to its end. `make screenshot`.

PYTHONPATH=. python scripts/screenshots.py docs/images/console-owner.png
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM, PATIENCE_MS, console
from tests.parties.world import World

RECORDS = [{"prompt": f"Question: who is number {n}?\nAnswer:", "completion": f" Ann{n}"} for n in range(32)]
MOST_BYTES = 200_000


def main() -> int:
    """Take the picture."""
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root), profile="guarded")
        with world.running():
            world.grant("--export", "provider-consent", "--tokens", "200000")
            with console(world, "owner", "alice") as link, sync_playwright() as running:
                browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
                page = browser.new_page(viewport={"width": 1120, "height": 800})
                page.set_default_timeout(PATIENCE_MS)
                _take(page, link, out)
                browser.close()
    size = out.stat().st_size
    print(f"{out}: {size:,} bytes")
    return 0 if size < MOST_BYTES else 1


def _take(page: Any, link: str, out: Path) -> None:
    base = link.split("/enter#")[0]
    page.goto(link)
    page.wait_for_url(f"{base}/")
    page.goto(f"{base}/data")
    content = "".join(json.dumps(it) + "\n" for it in RECORDS).encode()
    page.set_input_files("#file", {"name": "notes.jsonl", "mimeType": "application/jsonl", "buffer": content})
    page.click("#upload")
    page.wait_for_url("**/jobs/new?file=*")
    page.fill("#epochs", "8")
    page.fill("#suffix", "notes")
    page.click("#begin")
    page.wait_for_url("**/jobs/ftjob-*")
    page.wait_for_selector("#losses tr:nth-child(24)", state="attached")
    page.screenshot(path=out)


if __name__ == "__main__":
    sys.exit(main())
