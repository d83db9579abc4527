"""Base and tuned model in a chat, side by side, by the model's own template; each goes on with its own answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from obfuscatune.assets import tiny_model_path
from tests.browser.conftest import Eyes, console
from tests.browser.test_journeys import begin_job
from tests.parties.world import MODEL, World

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
TEMPLATE = (
    "{% for it in messages %}<{{ it.role }}>{{ it.content }}{{ eos_token if it.role == 'assistant' else '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORDS = [
    {"messages": [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"Ann{n}"}]}
    for n in range(24)
]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world whose model has a chat template."""
    root = tmp_path_factory.mktemp("chatting")
    model = root / "model"
    shutil.copytree(tiny_model_path(), model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    made = World(root, model=model)
    with made.running():
        yield made


def test_a_conversation_goes_on_with_each_sides_own_answers(
    chatting: World, eyes: Eyes, opened: Callable[[str], Any]
) -> None:
    with console(chatting, "owner", "alice") as link:
        page, base = opened(link), link.split("/enter#")[0]
        begin_job(page, base, records=RECORDS, epochs=8, suffix="chat")
        page.wait_for_selector("text=Signed by the enclave")
        page.click("text=Compare with the base")
        assert page.input_value("#mode") == "chat"
        assert page.inner_text("#base") == MODEL
        asked: list[dict[str, Any]] = []

        def note(request: Any) -> None:
            if request.url.endswith("/compare/answer"):
                asked.append(request.post_data_json)

        page.on("request", note)
        page.fill("#tokens", "6")
        page.fill("#system", "Names alone.")
        answers: dict[str, list[str]] = {"base": [], "tuned": []}
        for question in ("Who is 3?", "Who is 7?"):
            page.fill("#prompt", question)
            page.click("#ask")
            page.wait_for_selector("#ask:not([disabled])")
            assert page.input_value("#prompt") == ""
            for side, found in answers.items():
                found.append(page.locator(f"#answers-{side} output").last.inner_text())
        assert not page.locator("#answers .bad").count()
        second = {("tuned" if it["model"].startswith("ft:") else "base"): it for it in asked[2:]}
        for side, found in answers.items():
            assert second[side]["mode"] == "chat"
            told = [(it["role"], it["content"].strip()) for it in second[side]["messages"]]
            assert told == [
                *(("system", "Names alone."), ("user", "Who is 3?")),
                *(("assistant", found[0].strip()), ("user", "Who is 7?")),
            ]
        eyes.look(page, "owner-chat")
        page.click("#anew")
        assert page.locator("#answers .turn").count() == 0
        page.select_option("#mode", "text")
        assert page.locator("#system-field").is_hidden()
