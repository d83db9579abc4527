"""The API of a running service, as the official client and a hostile one speak it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from obfuscatune.errors import IntegrityError, TermsError
from tests.service.parties import MODEL, Cloud, Party

DATA = b"".join(json.dumps({"prompt": f"q{n}", "completion": f" a{n}"}).encode() + b"\n" for n in range(4))


@pytest.fixture
def http(cloud: Cloud) -> Iterator[httpx.Client]:
    with cloud.http(cloud.owners[0]) as client:
        yield client


@pytest.fixture
def other(cloud: Cloud) -> Iterator[httpx.Client]:
    with cloud.http(cloud.owners[1]) as client:
        yield client


@pytest.fixture
def client(cloud: Cloud) -> Iterator[openai.OpenAI]:
    with cloud.openai(cloud.owners[0]) as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [it.id for it in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "provider"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(MODEL)


def test_completions_equal_generate(cloud: Cloud, client: openai.OpenAI) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from obfuscatune.assets import tiny_model_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    ids = tokenizer("Once upon a time", return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "max_new_tokens": 12}
        wanted = model.generate(**ids, **how, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    found = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=12, temperature=0.8, top_p=0.9, seed=7
    )
    assert found.choices[0].text == tokenizer.decode(wanted)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 12


def test_streams_say_what_answers_say(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "seed": 3, "n": 2}
    whole = client.chat.completions.create(**asked, max_completion_tokens=8, logprobs=True, top_logprobs=2)
    texts = ["", ""]
    usage = None
    for chunk in client.chat.completions.create(
        **asked, max_completion_tokens=8, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [it.message.content for it in whole.choices]
    assert usage == whole.usage
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 8
    assert all(len(it.top_logprobs) == 2 and it.logprob <= 0 for it in told.content)


def test_completions_in_all_forms(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt=["One day", "Two"], n=2, max_tokens=3, echo=True, logprobs=1, temperature=0
    )
    assert [it.index for it in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("One day")
    assert found.choices[0].text == found.choices[1].text
    told = found.choices[2].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == found.choices[2].text
    ids = client.completions.create(model=MODEL, prompt=[[5, 6], [7]], max_tokens=1, stop=["zzz"])
    assert len(ids.choices) == 2
    streamed = client.completions.create(model=MODEL, prompt="One day", max_tokens=3, temperature=0, stream=True)
    assert "One day" + "".join(it.choices[0].text for it in streamed) == found.choices[0].text


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "model", "missing_required_parameter"),
        ({"model": MODEL, "prompt": "x", "wat": 1}, "wat", "unknown_parameter"),
        ({"model": MODEL, "prompt": "x", "temperature": 3}, "temperature", "invalid_value"),
        ({"model": MODEL, "prompt": "x", "max_tokens": 65}, "max_tokens", "invalid_value"),
        ({"model": MODEL, "prompt": "x", "n": 5}, "n", "invalid_value"),
        ({"model": MODEL, "prompt": "word " * 5000}, "prompt", "context_length_exceeded"),
        ({"model": MODEL, "prompt": [10**8]}, None, "invalid_value"),
        ({"model": MODEL, "prompt": "x", "logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value"),
        ({"model": MODEL, "prompt": "\ud800"}, None, "invalid_value"),
        ({"model": "ft:tiny:a:b:c", "prompt": "x"}, "model", "model_not_found"),
        ({"model": "ft:" + ":" * 50, "prompt": "x"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_is_said_in_openai_s_form(
    http: httpx.Client, body: dict[str, Any], param: str | None, code: str
) -> None:
    answer = http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"a":' * 10**4, b"1" * 5000, b"NaN"])
def test_no_body_is_an_error_of_ours(http: httpx.Client, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/fine_tuning/jobs", "/v1/files"):
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, path
        assert "error" in answer.json()


def test_a_body_is_bounded(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 65536

    for content in (b" " * (4 * 2**20 + 1), endless()):
        answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_files_come_back_as_they_were(client: openai.OpenAI, other: httpx.Client, cloud: Cloud) -> None:
    made = client.files.create(file=("notes.jsonl", DATA), purpose="fine-tune")
    assert (made.bytes, made.filename, made.status) == (len(DATA), "notes.jsonl", "processed")
    assert client.files.content(made.id).read() == DATA
    assert made.id in [it.id for it in client.files.list(purpose="fine-tune")]
    assert not list(client.files.list(purpose="fine-tune-results"))
    for path in (f"/v1/files/{made.id}", f"/v1/files/{made.id}/content"):
        assert other.get(path).status_code == 404
    assert other.delete(f"/v1/files/{made.id}").status_code == 404
    assert other.get("/v1/files").json()["data"] == []
    stored = b"".join(it.read_bytes() for it in (cloud.folder / "state").rglob("*") if it.is_file())
    assert b"notes.jsonl" not in stored
    assert DATA[:20] not in stored
    assert client.files.delete(made.id).deleted
    assert not (cloud.folder / "state" / "files" / made.id).exists()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no record"),
        (b'{"prompt": "a"}', "fields"),
        (b'{"text": "a"}', "expected `messages`"),
        (DATA + b'{"prompt": 1, "completion": "x"}', "t.jsonl:5"),
        (b"\xff\xfe", "UTF"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', "t.jsonl:1"),
    ],
)
def test_training_data_are_read_when_they_come(client: openai.OpenAI, content: bytes, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.files.create(file=("t.jsonl", content), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("t.jsonl", DATA), purpose="assistants")


def test_jobs_are_checked(client: openai.OpenAI, other: httpx.Client) -> None:
    made = client.files.create(file=("t.jsonl", DATA), purpose="fine-tune")
    for changes in ({"model": "another"}, {"training_file": "file-x"}, {"validation_file": "file-x"}):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.create(**{"model": MODEL, "training_file": made.id, **changes})  # type: ignore[arg-type]
    for wrong in ({"suffix": "a:b"}, {"seed": -1}, {"hyperparameters": {"n_epochs": 0}}, {"method": {"type": "dpo"}}):
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.create(model=MODEL, training_file=made.id, **wrong)  # type: ignore[arg-type]
    taken = other.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": made.id})
    assert taken.status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-x")
    assert other.get("/obfuscatune/v1/jobs/ftjob-x/receipt").status_code == 404


def test_who_is_not_known_does_not_get_in(cloud: Cloud) -> None:
    stranger = Party.make("stranger")
    for party in (stranger, cloud.owners[2], cloud.provider):
        with cloud.http(party) as http, pytest.raises(httpx.TransportError):
            http.get("/v1/models")
    host, _, port = cloud.where["api"].rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain) as wrapped,
    ):
        answer = b""
        with contextlib.suppress(OSError):  # the alert, or the connection's end, whichever is seen first
            wrapped.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = wrapped.recv(100)
        assert answer == b""


def test_what_the_channel_refuses(cloud: Cloud) -> None:
    stranger = Party.make("stranger")
    with pytest.raises(TermsError, match="no grant names"):
        cloud.release(stranger)
    with pytest.raises(IntegrityError, match="another key"):
        cloud.release(Party(cloud.owners[0].identity, os.urandom(32)))
    taken = Cloud(cloud.folder, stranger, cloud.owners, cloud.worker, where=cloud.where, key=cloud.key)
    taken.config, taken.command, taken.simulation = cloud.config, cloud.command, cloud.simulation
    taken.manifest = cloud.manifest
    with pytest.raises((TermsError, IntegrityError)):
        taken.grant()  # another provider: he signed neither the bundle nor the earlier grant
    with pytest.raises(TermsError, match="consent"):
        cloud.consent(stranger, "ft:tiny:x")
    with cloud.channel(cloud.owners[0]) as channel:
        assert channel.request("status", {})["owner_key"] is True


def test_metrics_tell_nothing_of_whom(cloud: Cloud, http: httpx.Client) -> None:
    http.get("/v1/files/canary-path")
    text = httpx.get(f"http://{cloud.where['operator']}/metrics").text
    assert "obfuscatune_requests_total" in text
    for private in (cloud.owners[0].spki[:8], MODEL + '"', "canary", "ft:"):
        assert private not in text
    assert httpx.get(f"http://{cloud.where['operator']}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"http://{cloud.where['operator']}/v1/models").status_code == 404


def test_the_log_hides_others_and_verifies(cloud: Cloud, http: httpx.Client, tmp_path: Path) -> None:
    from obfuscatune.channel.audit_chain import verify_copy

    with cloud.channel(cloud.owners[0]) as channel:
        key = channel.verified.claims.signing_key
    (tmp_path / "log").write_bytes(http.get("/obfuscatune/v1/audit-log").content)
    with (tmp_path / "log").open("rb") as file:
        head, clear = verify_copy(file, frozenset({key}))
    assert 0 < clear < head.count
    lines = [json.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    assert {it["entry"]["who"] for it in lines if "entry" in it} == {cloud.owners[0].spki, "service"}


def test_the_schema_is_there(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert "422" not in json.dumps(document["paths"])


def test_what_a_job_will_cost_is_told_before_it_begins(
    client: openai.OpenAI, http: httpx.Client, other: httpx.Client
) -> None:
    lines = [json.dumps({"prompt": f"note {n}", "completion": f" is {n}"}) for n in range(10)]
    file = client.files.create(file=("n.jsonl", "\n".join(lines).encode()), purpose="fine-tune").id

    before = http.get("/v1/fine_tuning/jobs").json()

    def estimate(epochs: int, batch: int, asker: httpx.Client = http) -> httpx.Response:
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": batch}}}
        body = {"model": MODEL, "training_file": file, "method": method}
        return asker.post("/obfuscatune/v1/estimate", json=body)

    once, thrice = estimate(1, 4).json(), estimate(3, 4).json()
    assert (once["examples"], once["steps"], thrice["steps"]) == (10, 3, 9)
    assert thrice["tokens"] == 3 * once["tokens"] > 30
    assert once["tokens_left"] is None and once["enough"]
    assert estimate(1, 4, other).status_code == 404  # another owner's file
    assert estimate(0, 4).status_code == 400
    assert http.get("/v1/fine_tuning/jobs").json() == before
