"""The whole story in real processes: train, kill, restart, go on, use, export, verify. Minutes long."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from obfuscatune.cli import app
from obfuscatune.enclave.local_worker import LocalWorker
from tests.service.parties import MODEL, Cloud, Party, ready

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
RECORDS = [{"prompt": f"The canary of patient {n} says", "completion": f" zanzibar {n}"} for n in range(24)]
DATA = b"".join(json.dumps(it).encode() + b"\n" for it in RECORDS)


@pytest.fixture(params=["sqlite", "postgresql"])
def whole(request: pytest.FixtureRequest, worker: LocalWorker, tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, Party.make("provider"), [Party.make("one"), Party.make("two")], worker.address)
    if request.param == "postgresql":
        made.settings = {"database": request.getfixturevalue("own_postgres")}
    made.prepare()
    made.start()
    try:
        opened(made)
        yield made
    finally:
        for client in made.clients:
            client.close()
        if made.process is not None and made.process.poll() is None:
            made.kill()


def opened(cloud: Cloud) -> None:
    """Both release their keys to a service that was started."""
    cloud.grant()
    for owner in cloud.owners:
        cloud.release(owner)
    ready(cloud, cloud.owners[0])


def job_until(client: openai.OpenAI, job: str, wanted: Callable[[Any], bool]) -> Any:
    for _ in range(1200):
        found = client.fine_tuning.jobs.retrieve(job)
        if wanted(found):
            return found
        assert found.status not in ("failed", "cancelled"), found.error
        time.sleep(0.1)
    raise AssertionError(f"the job did not come so far: {found}")


def has_checkpoint(client: openai.OpenAI, job: str) -> Callable[[Any], bool]:
    return lambda found: bool(client.fine_tuning.jobs.checkpoints.list(job).data) or found.status == "succeeded"


def losses(client: openai.OpenAI, job: str) -> dict[int, float]:
    events = client.fine_tuning.jobs.list_events(job, limit=100)
    data = [it.data for it in events if it.type == "metrics"]
    steps = [int(it["step"]) for it in data]  # type: ignore[index]
    assert len(steps) == len(set(steps)), "a step was told twice"
    return {int(it["step"]): float(it["train_loss"]) for it in data}  # type: ignore[index]


def test_a_job_from_its_data_to_its_receipt(whole: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = whole.owners
    client = whole.openai(one)
    file = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    asked: dict[str, Any] = {
        "model": MODEL,
        "training_file": file.id,
        "suffix": "notes",
        "seed": 1,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}}},
    }
    first = client.fine_tuning.jobs.create(**asked, extra_headers={"Idempotency-Key": "k"})
    assert client.fine_tuning.jobs.create(**asked, extra_headers={"Idempotency-Key": "k"}).id == first.id
    with pytest.raises(openai.APIStatusError, match="needs this file"):
        client.files.delete(file.id)

    job_until(client, first.id, has_checkpoint(client, first.id))
    whole.kill()
    client.close()
    whole.start()
    with pytest.raises(openai.APIConnectionError):  # nobody is known before both have released their keys
        openai.OpenAI(base_url=f"{whole.url}/v1", api_key="x", max_retries=0).models.list()
    opened(whole)
    client = whole.openai(one)
    done = job_until(client, first.id, lambda found: found.status == "succeeded")
    assert done.fine_tuned_model.startswith(f"ft:{MODEL}:{one.spki[:8]}:notes:")
    assert sorted(losses(client, first.id)) == list(range(1, 25))

    results = client.files.content(done.result_files[0]).read()
    assert results.startswith(b"step,train_loss") and len(results.splitlines()) == 25

    # It learnt; by name at once; another owner does not see it.
    prompt = RECORDS[0]["prompt"]
    said = client.completions.create(model=done.fine_tuned_model, prompt=prompt, max_tokens=8, temperature=0)
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    assert said.choices[0].text != plain.choices[0].text
    checkpoint = client.fine_tuning.jobs.checkpoints.list(first.id).data[0]
    assert (
        client.completions.create(
            model=checkpoint.fine_tuned_model_checkpoint, prompt=prompt, max_tokens=8, temperature=0
        )
        .choices[0]
        .text
        == said.choices[0].text
    )
    assert done.fine_tuned_model in [it.id for it in client.models.list()]
    other = whole.openai(two)
    assert [it.id for it in other.models.list()] == [MODEL]
    for ask in (
        lambda: other.completions.create(model=done.fine_tuned_model, prompt="x"),
        lambda: other.models.retrieve(done.fine_tuned_model),
        lambda: other.models.delete(done.fine_tuned_model),
        lambda: other.fine_tuning.jobs.retrieve(first.id),
        lambda: other.fine_tuning.jobs.cancel(first.id),
        lambda: other.fine_tuning.jobs.list_events(first.id),
        lambda: other.files.retrieve(done.result_files[0]),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()

    # Receipt and adapter.
    with whole.http(one) as http:
        refused = http.get(f"/obfuscatune/v1/jobs/{first.id}/adapter")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "export_not_allowed")
        whole.consent(one, done.fine_tuned_model)
        packed = http.get(f"/obfuscatune/v1/jobs/{first.id}/adapter")
        assert packed.status_code == 200
        (tmp_path / "receipt.json").write_bytes(http.get(f"/obfuscatune/v1/jobs/{first.id}/receipt").content)
        (tmp_path / "audit.jsonl").write_bytes(http.get("/obfuscatune/v1/audit-log").content)
    with tarfile.open(fileobj=io.BytesIO(packed.content)) as archive:
        archive.extractall(tmp_path / "adapter", filter="data")
    with whole.channel(one) as channel:
        key = channel.verified.claims.signing_key
    capsys.readouterr()
    receipt = ["verify-receipt", str(tmp_path / "receipt.json"), "--key", key]
    assert app.run([*receipt, "--adapter", str(tmp_path / "adapter"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["receipt"]
    assert about["products"]["verified"] > 0
    assert about["steps"] == 24
    assert app.run(["verify-log", str(tmp_path / "audit.jsonl"), "--key", key]) == 0
    assert app.run(["verify-log", str(tmp_path / "audit.jsonl"), "--key", "0" * 64]) == 1

    # Nothing of it lies on the disk in clear.
    stored = b"".join(it.read_bytes() for it in (tmp_path / "state").rglob("*") if it.is_file())
    stored += (tmp_path / "service.log").read_bytes()
    for canary in (b"canary", b"zanzibar", b"notes", b"lora_A"):
        assert canary not in stored, canary
    for client_ in (client, other):
        client_.close()
    assert whole.stop() == 0


def test_cancel_pause_and_what_terms_forbid(whole: Cloud) -> None:
    client = whole.openai(whole.owners[0])
    file = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    asked: dict[str, Any] = {"model": MODEL, "training_file": file.id, "seed": 1}
    job = client.fine_tuning.jobs.create(**asked, hyperparameters={"n_epochs": 50, "batch_size": 1})
    job_until(client, job.id, has_checkpoint(client, job.id))
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    job_until(client, job.id, lambda found: found.status == "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)
    assert not (whole.folder / "state" / "runs" / job.id).exists()

    whole.grant(uses=("inference",), tokens=30)
    with pytest.raises(openai.PermissionDeniedError, match="uses"):
        client.fine_tuning.jobs.create(**asked)
    client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=15, temperature=0)
    with pytest.raises(openai.PermissionDeniedError, match="tokens"):
        client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=15, temperature=0)
    whole.grant(tokens=50)
    job = client.fine_tuning.jobs.create(**asked)
    for _ in range(600):
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status == "failed":
            break
        time.sleep(0.1)
    assert found.error is not None
    assert found.error.code == "TermsError"
    whole.revoke()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=MODEL, prompt="x")
    client.close()
    assert whole.stop() == 0


def test_the_health_of_a_service_that_has_no_keys(worker: LocalWorker, tmp_path: Path) -> None:
    made = Cloud(tmp_path, Party.make("provider"), [Party.make("one")], worker.address)
    made.prepare()
    made.start()
    assert httpx.get(f"http://{made.where['operator']}/healthz").json() == {"status": "ok"}
    with made.channel(made.provider) as channel:
        assert channel.request("status", {})["models"] == []
    with made.http(made.owners[0]) as http, pytest.raises(httpx.TransportError):
        http.get("/healthz")
    assert made.stop() == 0
