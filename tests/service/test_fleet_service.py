"""A real service on a fleet of two real workers, of which one is killed: answers and jobs are as before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.protocol.certificates import fingerprint
from tests.enclave.fleet.namespaces import Place
from tests.enclave.fleet.tls_fleet import TlsFleet, tls_fleet
from tests.service.parties import MODEL, Cloud, Party, ready
from tests.service.test_whole import DATA, job_until, losses

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
LOSS_TOLERANCE = 1e-4
"""Of losses around 2 in float32, whose rounding the steps before have amplified."""
STEPS = 40


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path) as made:
        yield made


@pytest.fixture
def workers(fleet: TlsFleet) -> list[LocalWorker]:
    return fleet.start("cloud-a", "compute", [Place.on_loopback() for _ in range(2)])


@pytest.fixture
def cloud(fleet: TlsFleet, workers: list[LocalWorker], tmp_path: Path) -> Iterator[Cloud]:
    settings = {
        "worker": None,
        "fleet": fleet.document,
        "tls": {"certificate": str(fleet.certificate), "private_key": str(fleet.key)},
        "enclave_device": "cpu",
    }
    made = Cloud(tmp_path / "cloud", Party.make("provider"), [Party.make("one")], "", settings=settings)
    made.claims = {"workers": [fingerprint((tmp_path / "cloud-a.pem").read_bytes())]}
    made.prepare()
    made.start()
    try:
        made.grant()
        made.release(made.owners[0])
        ready(made, made.owners[0])
        yield made
    finally:
        for client in made.clients:
            client.close()
        if made.process is not None and made.process.poll() is None:
            made.stop()


def test_answers_and_jobs_outlive_a_worker(cloud: Cloud, workers: list[LocalWorker]) -> None:
    owner = cloud.owners[0]
    client = cloud.openai(owner)
    file = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")

    def answer() -> str:
        return (
            client.completions.create(model=MODEL, prompt="The patient", max_tokens=12, temperature=0).choices[0].text
        )

    def begun() -> str:
        recipe = {"max_steps": STEPS, "checkpoint_every": 10}
        asked: dict[str, Any] = {"model": MODEL, "training_file": file.id, "seed": 7, "extra_body": {"recipe": recipe}}
        return client.fine_tuning.jobs.create(**asked).id

    with cloud.channel(owner) as channel:
        assert list(channel.verified.claims.workers) == cloud.claims["workers"], "whom it trusts is what others verify"
    before, job = answer(), begun()
    job_until(client, job, lambda found: len(losses(client, job)) >= 3 or found.status == "succeeded")
    os.kill(workers[0].pid, signal.SIGKILL)
    assert answer() == before
    job_until(client, job, lambda found: found.status == "succeeded")
    log = (cloud.folder / "service.log").read_text()
    for line in (
        f"job {job}: the compute worker {workers[0].address}",
        f"WARNING the compute worker {workers[0].address}",
    ):
        assert any(line in it and "is left for a while" in it for it in log.splitlines()), log[-3000:]

    console = httpx.Client(follow_redirects=True, trust_env=False)
    with console:
        page = console.get(cloud.where["console"]).text
        assert all(it.address in page for it in workers), "the operator's page has a row of each"

    workers[0].restart()
    again = begun()
    job_until(client, again, lambda found: found.status == "succeeded")
    assert losses(client, job) == pytest.approx(losses(client, again), abs=LOSS_TOLERANCE)
    assert answer() == before
