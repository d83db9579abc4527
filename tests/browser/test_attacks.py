"""What other sites, and whoever writes names, files, prompts and answers, can do to a console in a browser: nothing.

The console of an owner stands before a service that puts an attack into every text (tests/console/conftest.py).
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.console.conftest import ATTACK, JOB, Served
from tests.console.conftest import owner_console_served as owner_console_served
from tests.console.conftest import owner_served as owner_served
from tests.console.conftest import provider_served as provider_served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
SHOWN = "document.body.innerText + [...document.querySelectorAll('option, output')].map(it => it.textContent)"
WATCH = "window.owned = []; for (const it of ['alert', 'confirm', 'prompt']) window[it] = (told) => owned.push(told);"


@contextmanager
def browser_of(chromium: Any, served: Served) -> Iterator[Any]:
    """A page within a session, which notes every dialog that a script opens."""
    context = chromium.new_context()
    try:
        context.add_init_script(WATCH)
        page = context.new_page()
        page.goto(served.shell.link())
        page.wait_for_url(served.base + "/")
        yield page
    finally:
        context.close()


@contextmanager
def site(content: str) -> Iterator[str]:
    """Another site's page, at another host name of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check_harmless(page: Any) -> None:
    """The attack stands there as text, and none of it ran or became an element."""
    assert page.evaluate("owned") == []
    assert page.locator("img[src=x]").count() == 0
    assert "<script>alert(1)</script>" in page.evaluate(SHOWN)


@pytest.mark.parametrize("path", ["/", "/data", "/jobs", "/jobs/new", f"/jobs/{JOB}", "/compare"])
def test_what_a_service_answers_does_not_run(chromium: Any, owner_served: Served, path: str) -> None:
    with browser_of(chromium, owner_served) as page:
        page.goto(owner_served.base + path)
        page.wait_for_load_state("networkidle")
        check_harmless(page)


def test_events_of_a_job_do_not_run(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page:
        page.goto(f"{owner_served.base}/jobs/{JOB}")
        page.wait_for_selector("#events li")
        assert page.inner_text("#events li span") == ATTACK
        check_harmless(page)


def test_errors_do_not_run(chromium: Any, owner_served: Served) -> None:
    assert owner_served.api is not None
    with browser_of(chromium, owner_served) as page:
        owner_served.api.error = ATTACK
        page.goto(f"{owner_served.base}/jobs")
        assert ATTACK in page.inner_text(".told")
        check_harmless(page)


def test_file_names_and_lines_do_not_run(chromium: Any, owner_served: Served) -> None:
    name = f"{ATTACK}.jsonl".replace("/", "")
    lines = [json.dumps({"prompt": ATTACK, "completion": ATTACK}), json.dumps({ATTACK: ATTACK}), ATTACK]
    with browser_of(chromium, owner_served) as page:
        page.goto(f"{owner_served.base}/data")
        content = "\n".join(lines).encode()
        page.set_input_files("#file", {"name": name, "mimeType": "application/jsonl", "buffer": content})
        page.wait_for_selector(".faults")
        assert name in page.inner_text(".checked-title")
        check_harmless(page)


def test_prompts_and_answers_do_not_run(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page:
        page.goto(f"{owner_served.base}/compare")
        page.fill("#prompt", ATTACK)
        page.click("#ask")
        for side in ("base", "tuned"):
            page.wait_for_selector(f"#answers-{side} output:not([aria-busy])")
            turns = page.locator(f"#answers-{side} .turn > :last-child").all_inner_texts()
            assert turns == [ATTACK, ATTACK]
        check_harmless(page)


def test_a_script_that_came_into_a_page_all_the_same_would_not_run(chromium: Any, owner_served: Served) -> None:
    """The policy is the second wall: of what stands in a page nothing runs, and nothing goes elsewhere."""
    with browser_of(chromium, owner_served) as page, site("<p>elsewhere</p>") as elsewhere:
        before = len(owner_served.api.came)  # type: ignore[union-attr]
        page.evaluate(
            """elsewhere => {
                const box = document.createElement('div');
                box.innerHTML = `<img src="x" onerror="alert(3)"><img src="${elsewhere}">
                    <a href="javascript:alert(4)" id="trap">x</a>`;
                document.body.append(box);
                const script = document.createElement('script');
                script.textContent = 'alert(5)';
                document.body.append(script);
            }""",
            elsewhere,
        )
        page.click("#trap")
        fetched = page.evaluate(
            "elsewhere => fetch(elsewhere, {mode: 'no-cors'}).then(() => 'went', () => 'refused')", elsewhere
        )
        assert fetched == "refused"
        assert page.evaluate("owned") == []
        assert len(owner_served.api.came) == before  # type: ignore[union-attr]


def test_no_site_shows_a_console_in_a_frame(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page, site(f'<iframe src="{owner_served.base}/"></iframe>') as elsewhere:
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text))
        page.goto(elsewhere)
        page.wait_for_load_state("networkidle")
        frame = page.frames[1]
        assert frame.url.startswith(("chrome-error:", "about:blank"))
        assert any("frame-ancestors" in it or "X-Frame-Options" in it for it in refused)


def test_no_site_changes_anything(chromium: Any, owner_served: Served) -> None:
    """A form that sends itself, and a script, of another site, in a browser that has a session."""
    target = f"{owner_served.base}/jobs/{JOB}/cancel"
    content = f"""<form method="post" action="{target}" id="form"><input name="x" value="y"></form>
        <script>fetch("{target}", {{method: "POST", mode: "no-cors", credentials: "include", body: "x"}})
            .finally(() => document.getElementById("form").submit())</script>"""
    assert owner_served.api is not None
    with browser_of(chromium, owner_served) as page, site(content) as elsewhere:
        owner_served.api.came.clear()
        with page.expect_response(lambda reply: reply.url == target and reply.request.is_navigation_request()) as told:
            page.goto(elsewhere, wait_until="commit")
        assert told.value.status == 403
        assert not owner_served.api.came
        page.wait_for_url(target)  # the refusal is shown: else it would come in the way of the next page
        page.goto(f"{owner_served.base}/jobs")
        assert page.url == f"{owner_served.base}/jobs"  # the session itself is as it was


def test_no_site_reads_anything(chromium: Any, owner_served: Served) -> None:
    with browser_of(chromium, owner_served) as page, site("<p>elsewhere</p>") as elsewhere:
        page.goto(elsewhere)
        read = "url => fetch(url, {credentials: 'include'}).then(it => it.text(), () => 'refused')"
        assert page.evaluate(read, f"{owner_served.base}/") == "refused"
        load = """url => new Promise(done => { const it = document.createElement('script');
            it.src = url; it.onload = () => done('ran'); it.onerror = () => done('refused');
            document.body.append(it); })"""
        assert page.evaluate(load, f"{owner_served.base}/static/console.js") == "refused"


def test_a_session_cannot_be_chosen_for_somebody(chromium: Any, owner_served: Served) -> None:
    """Whoever sets the cookie beforehand does not know the session that the link opens."""
    context = chromium.new_context()
    try:
        chosen = {
            "name": "obfuscatune_console",
            "value": "A" * 43,
            "domain": "127.0.0.1",
            "path": owner_served.shell.base,
        }
        context.add_cookies([chosen])
        page = context.new_page()
        page.goto(owner_served.shell.link())
        page.wait_for_url(owner_served.base + "/")
        (cookie,) = [it for it in context.cookies() if it["name"] == "obfuscatune_console"]
        assert cookie["value"] != "A" * 43
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["path"] == owner_served.shell.base
        assert page.evaluate("document.cookie") == ""
        assert "#" not in page.url and not page.evaluate("history.state")
    finally:
        context.close()


def test_what_an_enclave_tells_a_provider_does_not_run(chromium: Any, provider_served: Served) -> None:
    from tests.console.conftest import model_document

    assert provider_served.handler is not None
    asked = [{"owner": ATTACK, "adapter": ATTACK}]
    provider_served.handler.models = [model_document(ATTACK, asked=asked, reason=ATTACK)]
    provider_served.connection._look = None
    with browser_of(chromium, provider_served) as page:
        page.wait_for_selector(".asked")
        check_harmless(page)
