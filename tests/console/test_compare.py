"""Two models are asked the same: a conversation by the service's chat, a text as it stands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from obfuscatune.console.owner_compare import MOST_BYTES
from tests.console.conftest import TUNED, Served, model_document

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ann."},
    {"role": "user", "content": "And then?"},
]


def ask(served: Served, **changed: Any) -> Any:
    question = {"model": "llama", "mode": "chat", "messages": TURNS, "tokens": 7, "temperature": 0.5, **changed}
    return served.browser.post("/compare/answer", headers=served.csrf(served.browser), json=question)


def test_a_conversation_goes_to_the_chat_of_the_service_turn_by_turn(owner_served: Served) -> None:
    assert ask(owner_served).is_success
    assert owner_served.api is not None
    ((_, path, body),) = [it for it in owner_served.api.came if it[0] == "POST"]
    assert path == "/v1/chat/completions"
    assert json.loads(body) == {
        **{"model": "llama", "stream": True, "max_tokens": 7, "temperature": 0.5, "messages": TURNS},
    }


def test_a_text_is_continued_as_it_stands(owner_served: Served) -> None:
    assert ask(owner_served, mode="text").is_success
    assert owner_served.api is not None
    ((_, path, body),) = [it for it in owner_served.api.came if it[0] == "POST"]
    assert path == "/v1/completions"
    assert json.loads(body)["prompt"] == "And then?" and "messages" not in json.loads(body)


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "other"},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "x" * 20_001}]},
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        {"messages": TURNS * 40},
        {"tokens": 0},
        {"tokens": 2000},
        {"temperature": 3},
        {"model": ""},
        {"stream": False},
    ],
)
def test_nothing_else_is_asked(owner_served: Served, changed: dict[str, Any]) -> None:
    assert ask(owner_served, **changed).status_code == 400
    assert owner_served.api is not None
    assert not [it for it in owner_served.api.came if it[0] == "POST"]


def test_a_conversation_may_be_longer_than_a_form_and_not_without_end(owner_served: Served) -> None:
    turn = {"role": "user", "content": "x" * 20_000}
    assert ask(owner_served, messages=[turn] * 10).is_success
    assert owner_served.shell.large["/compare/answer"] == MOST_BYTES == 2**20  # the guard's own tests hold it to that


@pytest.mark.parametrize(("template", "mode"), [(True, "chat"), (False, "text"), (None, "text")])
def test_the_form_begins_with_what_the_model_is_made_for(
    owner_served: Served, template: bool | None, mode: str
) -> None:
    api = owner_served.api
    assert api is not None
    kept = api.answers["/obfuscatune/v1/status"]
    api.answers["/obfuscatune/v1/status"] = {"models": [model_document(chat_template=template)]}
    try:
        page = owner_served.browser.get("/compare").text
        assert f'<option value="{mode}" selected>' in page
        assert f'data-mode="{mode}"' in page and 'data-base="llama"' in page
        assert TUNED[:11] in page
    finally:
        api.answers["/obfuscatune/v1/status"] = kept
