"""A job's process and the service have one root key: a worker with a store is sent each matrix once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.local_worker import local_worker
from obfuscatune.service.opening import open_protected
from obfuscatune.service.settings import Settings


@pytest.mark.parametrize("has_store", [True, False])
def test_matrices_are_sent_again_only_where_the_worker_has_no_store(tmp_path: Path, has_store: bool) -> None:
    key = os.urandom(32)
    with local_worker(threads=1, store=tmp_path / "store" if has_store else None) as worker:
        settings = Settings.model_validate(
            {
                "listen": "127.0.0.1:0",
                "channel": "127.0.0.1:0",
                "state": str(tmp_path),
                "worker": {"address": worker.address},
                "attestation": {"producer": "configfs"},
                "bundles": [str(tmp_path)],
            }
        )
        sent = []
        with open_protected(tiny_model_path(), settings, RootKey(key), "tiny") as service:
            sent.append(service.protection.stats.bytes_uploaded)
            with open_protected(tiny_model_path(), settings, RootKey(key), "tiny") as job:  # beside it
                sent.append(job.protection.stats.bytes_uploaded)
    assert sent[0] > 0
    assert sent[1] == (0 if has_store else sent[0])
