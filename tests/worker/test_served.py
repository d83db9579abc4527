"""Weights that a worker has by itself: found by their digests, held once for all, and never mistaken for others."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.messages import Header, MessageType
from obfuscatune.protocol.payloads import NO_DIGEST, SERVES_WEIGHTS, Hello, Offer, Welcome
from obfuscatune.protocol.tensors import DType, weight_digest
from obfuscatune.worker.served import ServedWeights
from tests.worker.serving import RawClient, Serving, serving

P = 6
ID = bytes(range(16))
Q, K, V = (torch.randn(q, P, generator=torch.Generator().manual_seed(q)).bfloat16() for q in (8, 3, 4))
"""Of `nn.Linear`: each is Wᵀ (q, p)."""
CONV = torch.randn(P, 5, generator=torch.Generator().manual_seed(7))
"""Of `Conv1D`: W (p, q)."""
STACK = torch.randn(2, P, 9, generator=torch.Generator().manual_seed(9)).half()
WIDE = torch.randn(P, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def joined(*weights: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([W.to(dtype) for W in weights], dim=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {"q": Q, "k": K, "norm": torch.ones(P), "count": torch.ones(2, 2, dtype=torch.int64)}, folder / "a.safetensors"
    )
    save_file({"v": V, "conv": CONV, "experts": STACK, "wide": WIDE}, folder / "b.safetensors")
    return folder


@pytest.fixture
def worker(tmp_path: Path, model: Path) -> Iterator[Serving]:
    with serving(tmp_path, models=[model]) as running:
        yield running


def offer(
    client: RawClient, number: int, *weights: Tensor, shape: tuple[int, int] | None = None, dtype: DType = DType.FLOAT32
) -> MessageType:
    """What the worker answers to an OFFER of these W (p, q) side by side, under the id of that number."""
    shape = shape or (weights[0].shape[0], sum(W.shape[1] for W in weights))
    body = Offer(NO_DIGEST, tuple(weight_digest(W) for W in weights)).pack()
    header, _ = client.ask(Header(MessageType.OFFER, number + 1, bytes([number]) * 16, dtype, *shape, len(body)), body)
    return header.type


def held(worker: Serving) -> dict[bytes, Tensor]:
    """What the worker holds for all sessions, by the byte that ids are made of."""
    return {key[1]: matrix for key, (matrix, _) in worker.store._held.items()}


@pytest.mark.parametrize(
    "weights",
    [(Q.T,), (Q.T, K.T, V.T), (CONV,), (STACK[1],), (STACK[0].T,)],
    ids=["linear", "joined of two files", "conv1d", "of a stack", "of a stack, transposed"],
)
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT64])
def test_a_matrix_is_made_of_what_the_files_hold(worker: Serving, weights: tuple[Tensor, ...], dtype: DType) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, *weights, dtype=dtype) is MessageType.HAVE
        (matrix,) = held(worker).values()
    assert torch.equal(matrix, joined(*weights, dtype=dtype.torch_dtype))
    assert matrix.is_contiguous()


def test_a_float64_weight_is_known_by_all_its_digits(worker: Serving) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, WIDE, dtype=DType.FLOAT64) is MessageType.HAVE
        assert offer(client, 2, WIDE.float()) is MessageType.WANT


def test_sessions_share_one_copy_that_takes_nobodys_quota(worker: Serving) -> None:
    with RawClient(worker.address, b"1" * 32) as one, RawClient(worker.address, b"2" * 32) as other:
        for number, client in enumerate((one, other), start=1):
            client.hello()
            assert offer(client, number, Q.T, K.T, V.T) is MessageType.HAVE
        first, second = held(worker).values()
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert worker.store.held_bytes == 0
        sessions = list(worker.service.sessions._sessions)
        assert [worker.store.held_by(session) for session in sessions] == [first.nbytes] * 2  # so that they are kept
        kept = weakref.ref(first)
        del first, second
        one.ask(Header(MessageType.FORGET, 9, bytes([1]) * 16))
        gc.collect()
        assert kept() is not None
        other.ask(Header(MessageType.FORGET, 9, bytes(16)))
        gc.collect()
        assert kept() is None
        assert offer(other, 2, Q.T, K.T, V.T) is MessageType.HAVE  # made anew


def test_it_counts_as_a_matrix(worker: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.worker.store.MAX_MATRICES", 1)
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, Q.T) is MessageType.HAVE
        assert offer(client, 1, Q.T) is MessageType.HAVE  # in its own place
        assert offer(client, 2, K.T) is MessageType.ERROR


def test_it_gives_way_to_nobody(tmp_path: Path, model: Path) -> None:
    """To evict it would make no room."""
    with (
        serving(tmp_path, models=[model], quota_bytes=40, when_full="evict") as worker,
        RawClient(worker.address) as client,
    ):
        client.hello()
        assert offer(client, 1, Q.T) is MessageType.HAVE
        for number in (2, 3):
            store = Header(MessageType.STORE, number, bytes([number]) * 16, DType.FLOAT32, 2, 4, 32)
            assert client.ask(store, bytes(32))[0].type is MessageType.STORED
        assert set(held(worker)) == {bytes([1]) * 16, bytes([3]) * 16}


@pytest.mark.parametrize(
    ("weights", "shape"),
    [
        ((Q.T + 1,), None),
        ((Q.T, K.T + 1), None),
        ((Q.T, CONV.T), (P, 14)),
        ((Q.T,), (8, P)),
        ((Q.T, K.T), (P, 12)),
        ((Q.T, Q.T), None),
        ((), (P, 8)),
    ],
    ids=["unknown", "one unknown", "of two heights", "transposed", "too wide", "twice", "none"],
)
def test_what_it_has_not_is_asked_for(
    worker: Serving, weights: tuple[Tensor, ...], shape: tuple[int, int] | None
) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, *weights, shape=shape) is MessageType.WANT
        assert held(worker) == {}
        assert offer(client, 1, Q.T) is MessageType.HAVE
        assert offer(client, 2, Q.T, shape=(8, P)) is MessageType.WANT  # though it is made


def test_a_weight_is_in_one_matrix_at_a_time(worker: Serving) -> None:
    """So what is shared, and is in nobody's quota, has a bound."""
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, Q.T, K.T) is MessageType.HAVE
        assert offer(client, 2, K.T, Q.T) is MessageType.WANT
        assert offer(client, 3, K.T) is MessageType.WANT
        assert offer(client, 4, K.T, dtype=DType.FLOAT64) is MessageType.HAVE
        assert offer(client, 5, V.T) is MessageType.HAVE
        client.ask(Header(MessageType.FORGET, 9, bytes([1]) * 16))
        gc.collect()
        assert offer(client, 2, K.T, Q.T) is MessageType.HAVE


def test_a_file_that_has_changed_is_noticed(worker: Serving, model: Path) -> None:
    with (model / "a.safetensors").open("r+b") as file:
        data = bytearray(file.read())
        at = data.rindex(Q.view(torch.int16).numpy().tobytes())
        file.seek(at)
        file.write(bytes(4))
    with RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, Q.T) is MessageType.WANT
        assert offer(client, 2, K.T) is MessageType.HAVE


def test_it_is_kept_as_the_worker_keeps_matrices(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, models=[model], dtype=torch.bfloat16) as worker, RawClient(worker.address) as client:
        client.hello()
        assert offer(client, 1, Q.T, K.T) is MessageType.HAVE
        (matrix,) = held(worker).values()
    assert matrix.dtype == torch.bfloat16
    assert torch.equal(matrix, torch.cat([Q.T, K.T], dim=1))


def test_it_says_that_it_serves_weights(worker: Serving, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other") as without:
        for running, serves in ((worker, True), (without, False)):
            with RawClient(running.address) as client:
                body = Hello(bytes(32)).pack()
                _, welcome = client.ask(Header(MessageType.HELLO, payload_bytes=len(body)), body)
                assert bool(Welcome.unpack(bytes(welcome)).features & SERVES_WEIGHTS) == serves


@pytest.mark.parametrize("size", [48, 33, 95])
def test_half_a_digest_ends_the_connection(worker: Serving, size: int) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        header, text = client.ask(Header(MessageType.OFFER, 1, ID, DType.FLOAT32, P, 8, size), bytes(size))
        assert (header.type, header.request_id) == (MessageType.ERROR, 0)
        assert b"OFFER has 32 bytes for each digest" in bytes(text)
        assert client.at_end()


def damaged(folder: Path) -> None:
    save_file({"q": Q}, folder / "a.safetensors")
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-5])


REFUSED = {
    "missing": (lambda folder: folder.rmdir(), "there is no such directory"),
    "empty": (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), r"it holds no \*.safetensors"),
    "cut off": (damaged, "a.safetensors is no whole safetensors file .*: fetch it anew"),
    "no file": (lambda folder: (folder / "a.safetensors").write_bytes(b"pickle"), "is no whole safetensors file"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served(tmp_path: Path, make: object, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(ConfigError, match=message):
        ServedWeights([folder])


def test_it_is_refused_before_the_worker_listens(tmp_path: Path) -> None:
    command = (
        sys.executable,
        "-m",
        "obfuscatune.worker",
        "--listen",
        f"unix:{tmp_path}/s",
        "--serve-model",
        tmp_path / "x",
    )
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == f"error: --serve-model {tmp_path}/x: there is no such directory"
    assert not (tmp_path / "s").exists()
