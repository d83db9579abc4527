"""The official `openai` client, unmodified, through the owner's proxy, on a model whose workers are not trusted."""

import json
import time

import httpx
import openai
import pytest

from obfuscatune.assets import tiny_model_path
from obfuscatune.cli.app import run as command_line
from tests.parties.world import MODEL, run

NOTES = [{"prompt": f"note {n}:", "completion": f" the code of locker {n} is {n * n}"} for n in range(16)]
PROMPT = "note 3:"
STRONG = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 20}
"""So that answers change."""


@pytest.fixture(scope="module")
def alice(world):
    with world.proxy("alice") as url, openai.OpenAI(base_url=url, api_key="none-needed", max_retries=30) as client:
        yield client


@pytest.fixture(scope="module")
def data(world):
    path = world.root / "alice" / "notes.jsonl"
    path.write_text("".join(json.dumps(note) + "\n" for note in NOTES))
    return path


@pytest.fixture(scope="module")
def job(alice, data):
    """A job that has ended."""
    with data.open("rb") as file:
        uploaded = alice.files.create(file=file, purpose="fine-tune")
    started = alice.fine_tuning.jobs.create(
        model=MODEL,
        training_file=uploaded.id,
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": STRONG}},
    )
    ends = time.monotonic() + 120
    while (found := alice.fine_tuning.jobs.retrieve(started.id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < ends, found
        time.sleep(0.2)
    assert found.status == "succeeded", found.error
    return found


@pytest.fixture
def generated(capfd):
    """What `obfuscatune generate` writes after the prompt, plain, on the same model."""

    def generate(*more: object) -> str:
        asked = ("generate", "--plain", "--model", tiny_model_path(), "--prompt", PROMPT, "--json", *more)
        capfd.readouterr()
        code, said = command_line([str(it) for it in asked]), capfd.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)["text"]

    return generate


def test_the_model_is_there_by_the_name_that_was_granted(alice):
    assert MODEL in [model.id for model in alice.models.list()]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}])
def test_a_completion_is_what_generate_writes(alice, generated, sampling):
    answer = alice.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, **sampling)
    options = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert answer.choices[0].text == generated("--max-new-tokens", 24, *options)
    assert answer.usage.completion_tokens <= 24


def test_a_stream_brings_the_same_text_in_pieces(alice):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    pieces = list(alice.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert len(pieces) > 5
    assert text == alice.completions.create(**asked).choices[0].text
    assert pieces[-1].usage.completion_tokens > 0


@pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was renamed:UserWarning")
def test_a_tuned_model_answers_at_once_as_its_adapter_does_at_home(alice, generated, job, world):
    messages = [event.message for event in alice.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("succe" in message.lower() or "complete" in message.lower() for message in messages), messages
    world.grant("--export", "allowed")
    out = world.root / "alice" / "adapter"
    run("owner", "fetch-adapter", *world.options("alice"), "--job", job.id, "--out", out)
    tuned = alice.completions.create(model=job.fine_tuned_model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert tuned.choices[0].text == generated("--max-new-tokens", 24, "--adapter", out)
    base = alice.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    assert tuned.choices[0].text != base.choices[0].text


def test_a_job_has_a_receipt_and_its_story_is_in_the_log(alice, job, world):
    home = world.root / "alice"
    run("owner", "receipt", *world.options("alice"), "--job", job.id, "--out", home / "receipt.json")
    run("owner", "audit-log", *world.options("alice"), "--out", home / "audit.jsonl")
    assert job.id in run("verify-receipt", home / "receipt.json", "--policy", world.root / "policy.yaml")
    key = json.loads((home / "receipt.json").read_text())["key"]
    assert "entries" in run("verify-log", home / "audit.jsonl", "--key", key)


def test_what_is_alices_is_not_there_for_bob(alice, job, world):
    with world.service("bob") as bob:
        for path in (
            f"/v1/fine_tuning/jobs/{job.id}",
            f"/v1/files/{job.training_file}",
            f"/v1/files/{job.training_file}/content",
            f"/v1/models/{job.fine_tuned_model}",
            f"/obfuscatune/v1/jobs/{job.id}/receipt",
            f"/obfuscatune/v1/jobs/{job.id}/adapter",
        ):
            assert bob.http.get(path).status_code == 404, path
        assert bob.document("GET", "/v1/files")["data"] == bob.document("GET", "/v1/fine_tuning/jobs")["data"] == []
        asked = {"model": job.fine_tuned_model, "prompt": PROMPT, "max_tokens": 4}
        assert bob.http.post("/v1/completions", json=asked).status_code == 404


def test_who_has_no_certificate_or_an_unknown_one_gets_nothing(world):
    with world.service("alice") as service, pytest.raises(httpx.TransportError):
        httpx.get(f"{service.url}/v1/models", verify=False, trust_env=False)


def test_chats_take_a_template(alice):
    """The embedded model has none; the client is told so, in OpenAI's form."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    try:
        answer = alice.chat.completions.create(**asked)
    except openai.BadRequestError as error:
        assert "template" in error.message
    else:
        assert answer.choices[0].message.role == "assistant"
