"""What others wrote is shown as text, wherever it stands: files, models, jobs, errors, prompts, answers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from tests.console.conftest import ATTACK, JOB, Served, job_document

ALLOWED_SCRIPTS = ("/static/vendor/htmx.min.js", "/static/vendor/uPlot.iife.min.js", "/static/console.js")


class Elements(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.wrong, self.text = base, [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "script" and found.get("src", "").removeprefix(self.base) not in ALLOWED_SCRIPTS:
            self.wrong.append((tag, attrs))
        if tag == "img" and not str(found.get("src", "")).startswith(self.base + "/static/"):
            self.wrong.append((tag, attrs))
        for name, value in attrs:
            if name.startswith("on") or name == "style" or str(value).startswith("javascript:"):
                self.wrong.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(served: Served, body: str) -> str:
    """The text of a page, in which nothing of the attack is an element."""
    elements = Elements(served.shell.base)
    elements.feed(body)
    assert not elements.wrong
    assert "<script>alert" not in body and "<img src=x" not in body
    assert "1234321" not in elements.text  # no template was made of it
    return elements.text


@pytest.mark.parametrize("path", ["/", "/data", "/jobs", "/jobs/new", f"/jobs/{JOB}", "/compare"])
def test_what_a_service_answers_is_text(owner_served: Served, path: str) -> None:
    reply = owner_served.browser.get(path)
    assert reply.status_code == 200
    assert "<script>alert(1)</script>" in harmless(owner_served, reply.text)


def test_the_words_of_an_error_are_text(owner_served: Served) -> None:
    assert owner_served.api is not None
    owner_served.api.error = ATTACK
    reply = owner_served.browser.get("/jobs")
    assert reply.status_code == 403
    assert ATTACK in harmless(owner_served, reply.text)


def test_the_estimate_of_a_job_is_text(owner_served: Served) -> None:
    headers = owner_served.csrf(owner_served.browser)
    reply = owner_served.browser.post("/jobs/estimate", headers=headers, data={"model": ATTACK, "file": ATTACK})
    assert reply.status_code == 200
    harmless(owner_served, reply.text)


def test_a_file_and_its_name_and_its_lines_are_text(owner_served: Served) -> None:
    name = ATTACK.replace("/", "")
    content = "\n".join(
        [json.dumps({"prompt": ATTACK, "completion": ATTACK}), json.dumps({ATTACK: 1}), ATTACK, '{"prompt": 1}']
    )
    headers = {**owner_served.csrf(owner_served.browser), "x-file-name": quote(name)}
    reply = owner_served.browser.post("/data/check", headers=headers, content=content.encode())
    assert reply.status_code == 200
    text = harmless(owner_served, reply.text)
    assert name in text and ATTACK in text


def test_a_file_of_names_with_control_characters_and_paths_is_its_last_printable_part(owner_served: Served) -> None:
    headers = {**owner_served.csrf(owner_served.browser), "x-file-name": quote("../../etc/\r\nx: y\0passwd")}
    reply = owner_served.browser.post("/data/check", headers=headers, content=b"{}")
    assert "x: ypasswd" in reply.text


def test_what_a_refused_enclave_says_is_text(owner_served: Served) -> None:
    supervisor = owner_served.connection.supervisor
    kept = supervisor._standing, supervisor._refusal
    try:
        supervisor._standing, supervisor._refusal = None, ATTACK
        reply = owner_served.browser.get("/jobs")
        assert reply.status_code == 503
        assert ATTACK in harmless(owner_served, reply.text)
        assert ATTACK in harmless(owner_served, owner_served.browser.get("/").text)
    finally:
        supervisor._standing, supervisor._refusal = kept


def test_events_and_answers_are_json_of_which_scripts_make_text(owner_served: Served) -> None:
    with owner_served.browser.stream("GET", f"/jobs/{JOB}/live") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert [it["message"] for it in json.loads(lines[0])["events"]] == [ATTACK]
    headers = owner_served.csrf(owner_served.browser)
    asked = {"model": ATTACK, "mode": "chat", "messages": [{"role": "user", "content": ATTACK}]}
    reply = owner_served.browser.post("/compare/answer", headers=headers, json=asked)
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in reply.text.splitlines()] == [{"text": ATTACK}, {"end": True}]


def test_our_scripts_make_elements_of_our_own_pages_alone() -> None:
    """`innerHTML` is given what this console rendered, and nothing that came as JSON."""
    from importlib.resources import files

    script = (files("obfuscatune.console") / "static" / "console.js").read_text("utf-8")
    for line in script.splitlines():
        if "innerHTML" in line or "insertAdjacentHTML" in line:
            assert "await reply.text()" in line, line
    assert "eval(" not in script and "document.write" not in script


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/fine_tuning/jobs", {"data": [{**job_document("a"), "id": "../../x"}]}),
        ("/v1/fine_tuning/jobs", {"data": [{**job_document("a"), "status": "<b>"}]}),
        ("/v1/fine_tuning/jobs", {"data": "many"}),
        ("/v1/files", {"data": [{"id": 5}]}),
        ("/obfuscatune/v1/status", {"models": [{"model": None}]}),
    ],
)
def test_answers_of_another_form_are_refused_in_one_line(owner_served: Served, path: str, answer: object) -> None:
    api = owner_served.api
    assert api is not None
    kept = api.answers[path]
    api.answers[path] = answer
    try:
        page = {"/v1/files": "/data", "/obfuscatune/v1/status": "/"}.get(path, "/jobs")
        reply = owner_served.browser.get(page)
        assert reply.status_code == 502
        assert "in the service&#39;s answer" in reply.text
    finally:
        api.answers[path] = kept
