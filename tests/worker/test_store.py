"""What a worker holds: within its quota, each session apart, and on disk by content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from obfuscatune.errors import QuotaExceeded, StorageError, UnknownMatrix
from obfuscatune.protocol.tensors import content_digest
from obfuscatune.worker.quota import Quota, SessionKey
from obfuscatune.worker.store import ContentStore, MatrixStore

A, B = (SessionKey("peer", name) for name in (b"session a", b"session b"))
OTHER, THIRD = (SessionKey(name, b"session") for name in ("another peer", "a third"))
SIZE = 400
MATRIX = torch.ones(10, 10)


def held(store: MatrixStore, *ids: bytes, session: SessionKey = A) -> None:
    for matrix_id in ids:
        store.put((session, matrix_id), MATRIX.clone(), store.reserve(session, SIZE))


def kept_in(folder: Path, size: int = 100 * SIZE) -> ContentStore:
    return ContentStore(folder, Quota(size))


def holds(store: MatrixStore, matrix_id: bytes, session: SessionKey = A) -> bool:
    try:
        store.get((session, matrix_id))
    except UnknownMatrix:
        return False
    return True


def test_quota_refuses() -> None:
    store = MatrixStore(Quota(2 * SIZE))
    held(store, b"1", b"2")
    with pytest.raises(QuotaExceeded, match="you have 800 of the 800"):
        store.reserve(A, 1)
    store.forget((A, b"1"))
    held(store, b"3")
    assert store.held_bytes == 2 * SIZE


def test_claims_count_until_they_are_given_back() -> None:
    store = MatrixStore(Quota(2 * SIZE))
    store.reserve(A, SIZE)
    claim = store.reserve(A, SIZE)
    with pytest.raises(QuotaExceeded):
        store.reserve(A, 1)
    for _ in range(2):  # twice is once
        claim.release()
    store.reserve(A, SIZE)
    with pytest.raises(QuotaExceeded):
        store.reserve(A, 1)


def test_evicts_what_was_not_used_for_longest() -> None:
    store = MatrixStore(Quota(2 * SIZE), "evict")
    held(store, b"1", b"2")
    store.get((A, b"1"))
    held(store, b"3")
    assert [holds(store, matrix_id) for matrix_id in (b"1", b"2", b"3")] == [True, False, True]


def test_what_can_never_fit_evicts_nothing() -> None:
    store = MatrixStore(Quota(2 * SIZE), "evict")
    held(store, b"1", b"2")
    with pytest.raises(QuotaExceeded):
        store.reserve(A, 3 * SIZE)
    assert holds(store, b"1")
    assert holds(store, b"2")


def test_a_matrix_replaces_the_one_of_the_same_id() -> None:
    store = MatrixStore(Quota(2 * SIZE))
    held(store, b"1", b"1", b"1")
    assert store.held_bytes == SIZE


def test_sessions_are_apart() -> None:
    store = MatrixStore(Quota(10 * SIZE))
    held(store, b"1")
    assert not holds(store, b"1", session=B)
    store.forget((B, b"1"))
    store.forget_session(B)
    assert holds(store, b"1")
    held(store, b"1", session=B)
    store.forget_session(A)
    assert holds(store, b"1", session=B)
    assert not holds(store, b"1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_content_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept_in(tmp_path).save(A, matrix)
    again = kept_in(tmp_path).load(A, content_digest(matrix), (5, 7), dtype)
    assert again is not None
    assert torch.equal(again, matrix)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damaged_content_is_removed(damage: str, tmp_path: Path) -> None:
    store = kept_in(tmp_path)
    store.save(A, MATRIX)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[200] ^= 1
    file.write_bytes({"flip": data, "cut": data[:-4], "grow": data + b"0"}[damage])
    assert store.load(A, content_digest(MATRIX), (10, 10), MATRIX.dtype) is None
    assert not file.exists()


def test_the_same_bytes_in_another_shape_are_other_content(tmp_path: Path) -> None:
    store = kept_in(tmp_path)
    store.save(A, MATRIX)
    assert store.load(A, content_digest(MATRIX.view(5, 20)), (5, 20), MATRIX.dtype) is None


OTHERWISE = [((5, 20), torch.float32), ((10, 9), torch.float32), ((10, 10), torch.bfloat16)]


@pytest.mark.parametrize(("shape", "dtype"), OTHERWISE)
def test_to_name_another_shape_removes_nothing(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    """Else whoever knows a digest could empty the folder of other sessions' matrices."""
    store = kept_in(tmp_path)
    store.save(A, MATRIX)
    assert store.load(A, content_digest(MATRIX), shape, dtype) is None
    assert store.load(A, content_digest(MATRIX), (10, 10), MATRIX.dtype) is not None


def test_absent_content(tmp_path: Path) -> None:
    assert kept_in(tmp_path).load(A, bytes(32), (1, 1), torch.float32) is None


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        kept_in(tmp_path / "file")
