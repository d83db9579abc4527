"""One running service for the tests that speak with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from obfuscatune.enclave.local_worker import LocalWorker
from tests.service.parties import Cloud, Party, ready


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
