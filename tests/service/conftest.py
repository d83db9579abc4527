"""One running service for the tests that speak with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from parties import Cloud, Party  # noqa: E402

from obfuscatune.enclave.local_worker import LocalWorker  # noqa: E402


def ready(cloud: Cloud, owner: Party) -> None:
    """Wait until the model answers, a bounded time."""
    with cloud.http(owner) as http:
        for _ in range(600):
            models = http.get("/obfuscatune/v1/status").json()["models"]
            if models and models[0]["status"] != "loading":
                assert models[0]["status"] == "ready", models
                return
            time.sleep(0.1)
    raise AssertionError("the model was not loaded in time")


@pytest.fixture(scope="session")
def cloud(worker: LocalWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A service with a granted model, and two owners who released their keys; a third one did not."""
    folder = tmp_path_factory.mktemp("cloud")
    owners = [Party.make("first"), Party.make("second"), Party.make("third")]
    made = Cloud(folder, Party.make("provider"), owners, worker.address, limits={"max_tokens": 64, "choices": 4})
    made.prepare()
    made.start()
    try:
        made.grant()
        for owner in owners[:2]:
            made.release(owner)
        ready(made, owners[0])
        yield made
    finally:
        code = made.stop()
    assert code == 0
