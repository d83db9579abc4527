"""One tenant of a worker against another: nobody takes what others need, nor learns what they have."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.protocol.endpoints import TcpAddress
from obfuscatune.protocol.limits import MAX_HANDSHAKES
from obfuscatune.protocol.messages import NO_MATRIX, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Slice
from obfuscatune.protocol.tensors import DType, bytes_of, content_digest
from obfuscatune.protocol.tls import PinnedTls, TlsConfig, make_identity
from obfuscatune.worker import request_reader as intake_module
from tests.worker.serving import RawClient, Serving, serving

ID, ADAPTER = bytes(range(1, 17)), bytes(range(2, 18))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
ONE = torch.ones(1, 1)  # 4 bytes


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a worker and two enclaves, and one file with both of these."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("worker", "ours", "theirs"):
        certificate, key = make_identity(name)
        (folder / f"{name}.cert").write_bytes(certificate)
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.key").chmod(0o600)
    (folder / "both.cert").write_bytes((folder / "ours.cert").read_bytes() + (folder / "theirs.cert").read_bytes())
    return folder


def config(keys: Path, name: str, peers: str = "worker") -> TlsConfig:
    return TlsConfig(keys / f"{name}.cert", keys / f"{name}.key", keys / f"{peers}.cert")


@contextmanager
def serving_both(keys: Path, folder: Path, **options: object) -> Iterator[Serving]:
    """A worker by TLS, for two peers."""
    tls = PinnedTls(config(keys, "worker", "both"), server=True)
    with serving(folder, listen=TcpAddress("127.0.0.1", 0), tls=tls, **options) as worker:  # type: ignore[arg-type]
        yield worker


def client_of(worker: Serving, keys: Path, name: str, session: int = 0) -> RawClient:
    """A client with that key, greeted."""
    client = RawClient(worker.address, session.to_bytes(32, "big"), PinnedTls(config(keys, name), server=False))
    client.hello()
    return client


def store(client: RawClient, matrix: torch.Tensor, number: int = 1) -> Header:
    """Store a matrix under an id made of the number; the reply."""
    matrix_id = number.to_bytes(16, "big")
    header = Header(MessageType.STORE, number, matrix_id, DType.FLOAT32, *matrix.shape, matrix.nbytes)
    return client.ask(header, bytes_of(matrix))[0]


def multiply(client: RawClient, number: int = 1) -> Header:
    """Multiply a row of ones by it; the reply."""
    matrix_id = number.to_bytes(16, "big")
    return client.ask(Header(MessageType.MULTIPLY, 99, matrix_id, DType.FLOAT32, 1, 1, 4, DType.FLOAT32), bytes(4))[0]


def welcomed(worker: Serving, keys: Path | None = None) -> bool:
    """Whether another enclave gets a product, at once."""
    tls = None if keys is None else config(keys, "ours")
    with WorkerClient.open(str(worker.address), tls=tls) as link:
        link.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        return torch.equal(link.multiply(ID, X, transpose=False), X @ W)


def test_racing_attachments_leave_no_claim_behind(tmp_path: Path) -> None:
    """Several connections of a session attach the same adapter, again and again."""
    attachment = Attachment(ID, (Slice(0, 4, 1, 1.0, 0.0),)).pack()
    header = Header(MessageType.ATTACH, 1, ADAPTER, DType.FLOAT32, 3, 4, len(attachment))
    with serving(tmp_path) as worker, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(worker.address)) for _ in range(4)]
        for client in clients:
            client.hello()
        clients[0].ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
        start = threading.Barrier(len(clients))

        def attach(client: RawClient) -> None:
            for _ in range(50):
                start.wait()
                client.ask(header, attachment)

        threads = [threading.Thread(target=attach, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clients[0].ask(Header(MessageType.FORGET, 2, NO_MATRIX))
        assert worker.store.held_bytes == 0


def test_an_offer_makes_nothing_give_way(tmp_path: Path) -> None:
    with serving(tmp_path, quota_bytes=100, when_full="evict") as worker, RawClient(worker.address) as client:
        client.hello()
        store(client, ONE)
        offer = Header(MessageType.OFFER, 6, ID, DType.FLOAT32, 5, 5, 32)
        for digest in (bytes(32), content_digest(torch.zeros(5, 5))):
            assert client.ask(offer, digest)[0].type is MessageType.WANT
            assert multiply(client).type is MessageType.PRODUCT


def test_a_peer_evicts_its_own_matrices_and_nobody_else_s(keys: Path, tmp_path: Path) -> None:
    """Ours take less than half. Theirs want all that there is, and more."""
    with (
        serving_both(keys, tmp_path, quota_bytes=6400, when_full="evict") as worker,
        client_of(worker, keys, "ours") as ours,
        client_of(worker, keys, "theirs") as theirs,
    ):
        for number in (1, 2):
            assert store(ours, ONE, number).type is MessageType.STORED
        for number in range(1, 20):
            assert store(theirs, torch.ones(1, 250), number).type is MessageType.STORED
        assert store(theirs, torch.ones(1, 1590), 30).code == ErrorCode.QUOTA  # all but what would be ours
        assert multiply(ours, 1).type is multiply(ours, 2).type is MessageType.PRODUCT


def test_a_peer_within_its_share_has_others_give_way(keys: Path, tmp_path: Path) -> None:
    with (
        serving_both(keys, tmp_path, quota_bytes=6400, when_full="evict") as worker,
        client_of(worker, keys, "theirs") as theirs,
        client_of(worker, keys, "ours") as ours,
    ):
        for number in range(1, 7):
            store(theirs, torch.ones(1, 250), number)
        for number in (1, 2, 3):
            assert store(ours, torch.ones(1, 250), number).type is MessageType.STORED
        codes = [multiply(theirs, number).code for number in range(1, 7)]
        assert codes == [ErrorCode.UNKNOWN_MATRIX] * 3 + [0] * 3


def test_an_error_says_nothing_of_what_others_hold(keys: Path, tmp_path: Path) -> None:
    """Neither in its words, nor by which sizes are refused: but for a 64th of the whole."""
    found = []
    for held in (1281, 1300):
        with serving_both(keys, tmp_path, quota_bytes=6400) as worker, client_of(worker, keys, "theirs") as theirs:
            assert store(theirs, torch.ones(1, held)).type is MessageType.STORED
            with client_of(worker, keys, "ours") as ours:
                fits, refused = 0, 1600
                while refused - fits > 1:
                    columns = (fits + refused) // 2
                    offer = Header(MessageType.OFFER, 6, ID, DType.FLOAT32, 1, columns, 32)
                    reply, text = ours.ask(offer, bytes(32))
                    if reply.type is MessageType.WANT:
                        fits = columns
                    else:
                        refused = columns
                        assert str(4 * held).encode() not in text
                        assert b"you have 0" in text
                found.append(fits)
    assert found[0] == found[1]


def test_sessions_of_four_bytes_lock_nobody_out(tmp_path: Path) -> None:
    """As many as there may be, of enclaves that have gone: of this user, or of any."""
    with serving(tmp_path, max_sessions=8) as worker:
        for number in range(8):
            with RawClient(worker.address, number.to_bytes(32, "big")) as client:
                client.hello()
                store(client, ONE)
                client.transport.stop_sending()
                assert client.at_end()
        until_left(worker)
        assert welcomed(worker)


@pytest.mark.parametrize("holding", [False, True])
def test_sessions_that_stay_connected_lock_no_other_peer_out(keys: Path, tmp_path: Path, holding: bool) -> None:
    with serving_both(keys, tmp_path, max_sessions=8) as worker, ExitStack() as stack:
        for number in range(8):
            client = stack.enter_context(client_of(worker, keys, "theirs", number))
            if holding:
                store(client, ONE)
        assert welcomed(worker, keys)
        with client_of(worker, keys, "ours", 8) as again:
            assert store(again, ONE).type is MessageType.STORED


def test_silent_connections_lock_nobody_out(keys: Path, tmp_path: Path) -> None:
    """Strangers that do not even begin with TLS, or have no key."""
    with serving_both(keys, tmp_path) as worker, ExitStack() as stack:
        import socket

        for _ in range(2 * MAX_HANDSHAKES + 8):
            stack.enter_context(socket.create_connection((worker.address.host, worker.address.port)))
        assert welcomed(worker, keys)
        while len(worker.server._open) > MAX_HANDSHAKES + 1:  # those that were ended have threads for a moment
            time.sleep(0.01)


def test_an_idle_connection_is_closed_and_its_session_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as worker, RawClient(worker.address) as client:
        client.hello()
        store(client, ONE)
        monkeypatch.setattr(intake_module, "CONNECTION_IDLE_SECONDS", 0.05)
        multiply(client)
        assert client.at_end()
        until_left(worker)
        with RawClient(worker.address) as again:
            again.hello()
            assert multiply(again).type is MessageType.PRODUCT


def test_a_session_id_of_another_peer_is_another_session(keys: Path, tmp_path: Path) -> None:
    """Who has learnt it does not have the key."""
    with (
        serving_both(keys, tmp_path) as worker,
        client_of(worker, keys, "ours") as ours,
        client_of(worker, keys, "theirs") as theirs,
    ):
        store(ours, ONE)
        assert multiply(theirs).code == ErrorCode.UNKNOWN_MATRIX
        assert theirs.ask(Header(MessageType.FORGET, 5, NO_MATRIX))[0].type is MessageType.DONE
        assert multiply(ours).type is MessageType.PRODUCT


def test_the_disk_has_a_quota(tmp_path: Path) -> None:
    """Though matrices are forgotten as soon as they are stored; those that were used last are still there."""
    disk = tmp_path / "disk"
    for _ in range(2):  # the second worker finds what the first one left
        with serving(tmp_path, quota_bytes=1000, disk=disk) as worker, RawClient(worker.address) as client:
            client.hello()
            for number in range(1, 9):
                store(client, torch.full((1, 50), float(number)), number)
                client.ask(Header(MessageType.FORGET, 99, NO_MATRIX))
            assert sum(file.stat().st_size for file in disk.iterdir()) <= 1000
            offer = Header(MessageType.OFFER, 6, ID, DType.FLOAT32, 1, 50, 32)
            kept = client.ask(offer, content_digest(torch.full((1, 50), 8.0)))[0]
            assert kept.type is MessageType.HAVE


def test_a_worker_without_threads_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system gives none to one connection: the next one is served."""
    from obfuscatune.worker import server as module

    class Refusing(threading.Thread):
        def start(self) -> None:
            monkeypatch.setattr(module.threading, "Thread", threading_thread)
            raise RuntimeError("can't start new thread")

    threading_thread = threading.Thread
    with serving(tmp_path) as worker, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(module.threading, "Thread", Refusing)
        with RawClient(worker.address) as refused:
            assert refused.at_end()
        assert welcomed(worker)


def until_left(worker: Serving) -> None:
    """Wait for the threads of all connections."""
    for thread in list(worker.server._open):
        thread.join(20)
