"""A real service that is killed and started again: on the state that it left, and on one that was put back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.channel.grants import Grant
from obfuscatune.client import HeadFile, Service, connect
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import IntegrityError, TermsError
from obfuscatune.protocol.endpoints import TcpAddress
from tests.service.parties import Cloud, Party

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
ADAPTER = "ft:tiny:01010101:notes:" + "a" * 24


@pytest.fixture
def stopped(worker: LocalWorker, tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, Party.make("provider"), [Party.make("one")], worker.address)
    made.prepare()
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def test_words_and_heads_outlive_a_kill_and_a_state_that_was_put_back_is_refused(stopped: Cloud) -> None:
    cloud, owner = stopped, stopped.owners[0]
    heads = HeadFile(cloud.folder / "heads", "the enclave")

    def used() -> AbstractContextManager[Service]:
        host, _, port = str(cloud.where["channel"]).rpartition(":")
        return connect(TcpAddress(host, int(port)), owner.identity, cloud.policy, heads=heads)

    def consents() -> list[int]:
        with cloud.channel(cloud.provider) as channel:
            return [it["consents"] for it in channel.request("status", {})["models"]]

    first = cloud.grant()
    cloud.consent(owner, ADAPTER)
    with used() as service:
        assert service.request("GET", "/obfuscatune/v1/status").is_success
    before = heads.read()
    assert before is not None

    cloud.kill()
    shutil.copytree(cloud.folder / "state", cloud.folder / "old")
    cloud.start()
    assert consents() == []  # nothing is granted yet
    with pytest.raises(TermsError, match="no grant names this key"), used():
        pass
    assert cloud.grant()["grant"] != first["grant"]
    assert consents() == [1]
    with used():
        after = heads.read()
    assert after is not None
    assert after.count > before.count
    cloud.revoke()

    cloud.kill()
    cloud.start()
    with pytest.raises(TermsError, match=r"sequence: .* is older"):
        old_grant(cloud, sequence=1)
    cloud.grant()
    assert consents() == [0]

    cloud.kill()
    shutil.rmtree(cloud.folder / "state")
    (cloud.folder / "old").rename(cloud.folder / "state")
    cloud.start()
    cloud.grant()
    with pytest.raises(IntegrityError, match="does not go on from the"), used():
        pass
    assert heads.read() == after
    with cloud.channel(owner) as channel:
        assert not channel.request("status", {})["owner_key"]  # it was refused before anything was released


def old_grant(cloud: Cloud, sequence: int) -> dict[str, Any]:
    """The provider's own grant from before, once more."""
    assert cloud.key is not None
    with cloud.channel(cloud.provider) as channel, cloud.key.secret.view as view:
        terms = cloud.terms()
        grant = Grant("tiny", cloud.manifest, str(cloud.folder / "bundle"), terms, sequence)
        return channel.release("grant", grant.sign(cloud.provider.identity), bytes(view))
