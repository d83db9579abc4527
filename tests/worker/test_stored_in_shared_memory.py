"""A matrix that is laid out in shared memory: copied before anything is said about it, and only from within."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.protocol.framing import send_message
from obfuscatune.protocol.messages import SHARED, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import pack_number
from obfuscatune.protocol.shared_memory import SharedMemory
from obfuscatune.protocol.tensors import DType, bytes_of, content_digest
from obfuscatune.protocol.transcript import read_transcript
from obfuscatune.protocol.transport import Deadline
from obfuscatune.worker.buffers import HUGE_PAGE_BYTES, copy_of, matrix_memory
from tests.worker.serving import SECONDS, RawClient, Serving, serving

ID = bytes(range(1, 17))
SIZE = 8192
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)


class Sharing(RawClient):
    """A client that has greeted and shares memory."""

    def __init__(self, worker: Serving) -> None:
        super().__init__(worker.address)
        self.hello()
        self.memory, descriptor = SharedMemory.create(SIZE)
        header = Header(MessageType.SHARE, 1, payload_bytes=8)
        send_message(self.transport, header, pack_number(SIZE), deadline=Deadline(SECONDS), descriptor=descriptor)
        assert self.reply()[0].type is MessageType.DONE

    def lay(self, matrix: torch.Tensor, offset: int) -> torch.Tensor:
        rows, cols = matrix.shape
        return self.memory.matrix(offset, rows, cols, matrix.dtype).copy_(matrix)


def store(client: RawClient, offset: int, matrix: torch.Tensor = W) -> Header:
    """Say that the matrix lies there; the reply."""
    header = Header(MessageType.STORE, 2, ID, DType.of(matrix.dtype), *matrix.shape, payload_bytes=8, flags=SHARED)
    return client.ask(header, pack_number(offset))[0]


def product(client: RawClient) -> torch.Tensor:
    """X W by message."""
    ask = Header(MessageType.MULTIPLY, 3, ID, DType.FLOAT32, 2, 3, X.nbytes, DType.FLOAT32)
    came = client.ask(ask, bytes_of(X))[1]
    assert isinstance(came, torch.Tensor)
    return came


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


def test_it_is_copied_before_it_is_said_to_be_stored(worker: Serving) -> None:
    with Sharing(worker) as client:
        for matrix in (-W, W):  # the second in place of the first
            laid = client.lay(matrix, 128)
            assert store(client, 128).type is MessageType.STORED
            laid.fill_(7)
            assert torch.equal(product(client), X @ matrix)
        assert worker.store.held_bytes == W.nbytes


@pytest.mark.parametrize("offset", [4, 8192, 8192 - 32, 2**63, 2**64 - 64])
def test_nothing_outside_of_shared_memory_is_read(worker: Serving, offset: int) -> None:
    with Sharing(worker) as client:
        reply = store(client, offset)
        assert (reply.code, reply.request_id) == (ErrorCode.MALFORMED, 0)
        assert client.at_end()
    assert worker.store.held_bytes == 0  # what was claimed was given back


def test_where_no_memory_is_shared_none_can_be_named(worker: Serving) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        reply = store(client, 0)
        assert (reply.code, reply.request_id) == (ErrorCode.MALFORMED, 0)
        assert client.at_end()
    assert worker.store.held_bytes == 0


def test_without_room_the_connection_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path, quota_bytes=W.nbytes - 1) as worker, Sharing(worker) as client:
        reply = store(client, 0)
        assert (reply.code, reply.request_id) == (ErrorCode.QUOTA, 2)
        assert worker.store.held_bytes == 0
        small = client.lay(W[:2], 64)
        assert store(client, 64, small).type is MessageType.STORED


def test_memory_that_the_system_refuses_is_an_error_and_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with serving(tmp_path) as worker, RawClient(worker.address) as client:
        client.hello()
        monkeypatch.setattr("obfuscatune.worker.buffers.mmap.mmap", refused)
        client.say(Header(MessageType.STORE, 2, ID, DType.FLOAT32, 1024, 1024, 2**22))
        reply, text = client.reply()
        assert (reply.code, text) == (ErrorCode.FAILED, b"no memory for this request: Cannot allocate memory")
        assert client.at_end()
        assert worker.store.held_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_element_types(worker: Serving, dtype: torch.dtype) -> None:
    with Sharing(worker) as client:
        client.lay(W.to(dtype), 64)
        assert store(client, 64, W.to(dtype)).type is MessageType.STORED
        assert worker.store.held_bytes == 12 * dtype.itemsize
        assert torch.equal(product(client), X @ W)  # small whole numbers


def test_a_worker_of_another_precision_keeps_its_own(tmp_path: Path) -> None:
    with serving(tmp_path, dtype=torch.bfloat16) as worker, Sharing(worker) as client:
        client.lay(W, 64)
        assert store(client, 64).type is MessageType.STORED
        assert worker.store.held_bytes == W.nbytes // 2
        assert torch.equal(product(client), X @ W)


def test_it_is_recorded_as_if_it_had_been_sent(tmp_path: Path) -> None:
    with serving(tmp_path, record=tmp_path / "t") as worker, Sharing(worker) as client:
        client.lay(W, 64)
        assert store(client, 64).type is MessageType.STORED
    (stored,) = (entry for entry in read_transcript(tmp_path / "t") if entry.header.type is MessageType.STORE)
    assert (stored.header.shared, stored.header.payload_bytes) == (False, W.nbytes)
    assert stored.tensor is not None
    assert torch.equal(stored.tensor, W)


def test_it_is_kept_on_disk_under_what_it_holds(tmp_path: Path) -> None:
    with serving(tmp_path, disk=tmp_path / "disk") as worker, Sharing(worker) as client:
        offer = Header(MessageType.OFFER, 2, ID, DType.FLOAT32, 3, 4, 32)
        assert client.ask(offer, content_digest(W))[0].type is MessageType.WANT
        client.lay(-W, 64)
        assert store(client, 64).type is MessageType.STORED
        assert client.ask(offer, content_digest(W))[0].type is MessageType.WANT
        assert client.ask(offer, content_digest(-W))[0].type is MessageType.HAVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1000, 1000), (1024, 1024)])
def test_memory_for_what_stays(shape: tuple[int, int], dtype: torch.dtype) -> None:
    own = matrix_memory(*shape, dtype)
    assert (own.shape, own.dtype, own.is_contiguous()) == (torch.Size(shape), dtype, True)
    if own.nbytes >= HUGE_PAGE_BYTES:
        assert own.data_ptr() % HUGE_PAGE_BYTES == 0
    own.fill_(3)
    copy = copy_of(own)
    own.fill_(4)
    assert bool((copy == 3).all())


def test_a_system_without_huge_pages_has_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)  # EINVAL, as from a kernel that was built without them
    assert bool((copy_of(torch.ones(1024, 1024)) == 1).all())
