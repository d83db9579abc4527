"""What is sealed comes back, and what cannot be sealed is refused before anything is written."""

from __future__ import annotations

import itertools
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import ConfigError, DataError, IntegrityError, ModelFileError, StorageError
from obfuscatune.sealing import source as source_module
from obfuscatune.sealing.key_file import KeyFile
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.opening import Bundle
from obfuscatune.sealing.seal import seal
from tests.sealing.bundles import CHUNK_BYTES, FILES, Sealed, write_tree

KEY, SIGNER = BundleKey.generate(), Ed25519PrivateKey.generate()
SIGNERS = {SIGNER.public_key().public_bytes_raw().hex()}
parts = st.sampled_from(["a", "b", "é", "x y", ".hidden", "long" * 60])
trees = st.dictionaries(
    st.lists(parts, min_size=1, max_size=3).map("/".join), st.binary(max_size=70), min_size=1, max_size=6
).filter(lambda files: not any(f"{a}/" == b[: len(a) + 1] for a in files for b in files))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=trees, chunk_bytes=st.integers(1, 80))
def test_any_tree_comes_back_whatever_the_chunks(files: dict[str, bytes], chunk_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, bundle = write_tree(Path(folder, "source"), files), f"{folder}/bundle"
        digest = seal(source, bundle, key=KEY, signer=SIGNER, kind="data", chunk_bytes=chunk_bytes)
        opened = Bundle.open(bundle, key=KEY, manifest_digest=digest, signers=SIGNERS, kind="data")
        assert {name: opened.read_file(name) for name in opened.files} == files
        opened.check()
        opened.extract(Path(folder, "again"))
        assert {name: Path(folder, "again", name).read_bytes() for name in files} == files
        with opened.in_memory() as path:
            assert {name: (path / name).read_bytes() for name in files} == files
        assert not path.exists()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_storage_may_be_a_url(scheme: str, tmp_path: Path, sealed: Sealed) -> None:
    where = f"{scheme}://{tmp_path}/elsewhere"
    digest = seal(sealed.source, where, key=KEY, signer=SIGNER, chunk_bytes=16)
    bundle = Bundle.open(where, key=KEY, manifest_digest=digest, signers=SIGNERS)
    bundle.check()
    assert {name: bundle.read_file(name) for name in bundle.files} == FILES
    with pytest.raises(StorageError, match="not empty"):
        seal(sealed.source, where, key=KEY, signer=SIGNER)


def test_objects_of_a_url_are_bounded_and_compared_too(tmp_path: Path, sealed: Sealed) -> None:
    import fsspec

    where = f"memory://{tmp_path}"
    digest = seal(sealed.source, where, key=KEY, signer=SIGNER, chunk_bytes=16)
    store = fsspec.filesystem("memory")
    chunk = store.ls(f"{tmp_path}/chunks", detail=False)[0]
    held = store.cat_file(chunk)
    bundle = Bundle.open(where, key=KEY, manifest_digest=digest, signers=SIGNERS)
    for changed, said in (held + b"x", "longer than"), (held[:-1], "ends after"), (bytes(len(held)), "was changed"):
        store.pipe_file(chunk, changed)
        with pytest.raises(IntegrityError, match=said):
            bundle.check()
    store.rm_file(chunk)
    with pytest.raises(IntegrityError, match="is missing"):
        bundle.check()
    store.pipe_file(f"{tmp_path}/manifest", bytes(2**25))
    with pytest.raises(IntegrityError, match="longer than"):
        Bundle.open(where, key=KEY, manifest_digest=digest, signers=SIGNERS)


def test_a_write_that_is_refused_is_the_error_and_leaves_nothing(
    tmp_path: Path, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    write, written = MemoryFileSystem.pipe_file, itertools.count()

    def refuse_the_third(store: MemoryFileSystem, path: str, value: bytes) -> None:
        if next(written) >= 2:
            raise OSError("the disk is full")
        write(store, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse_the_third)
    with pytest.raises(StorageError, match="the disk is full"):
        seal(sealed.source, f"memory://{tmp_path}", key=KEY, signer=SIGNER, chunk_bytes=16)
    assert MemoryFileSystem().find(str(tmp_path)) == []


@pytest.mark.parametrize(
    "where",
    ["reference://x", "simplecache::memory://x", "memory://x::file:///etc", "data:// x", "nosuch://x", "file://host/x"],
)
def test_urls_that_do_more_than_hold_objects_are_refused(where: str, sealed: Sealed) -> None:
    with pytest.raises(ConfigError):
        Bundle.open(where, key=KEY, manifest_digest=sealed.digest, signers=SIGNERS)


def test_an_error_never_shows_what_a_url_carries(sealed: Sealed) -> None:
    where = "memory://user:hunter2@bucket/x?token=hunter2"
    with pytest.raises(IntegrityError) as failed:
        Bundle.open(where, key=KEY, manifest_digest=sealed.digest, signers=SIGNERS)
    assert "hunter2" not in str(failed.value)


def test_two_bundles_of_one_folder_and_one_key_have_nothing_in_common(tmp_path: Path, sealed: Sealed) -> None:
    seal(sealed.source, str(tmp_path / "again"), key=sealed.key, signer=sealed.signer, chunk_bytes=CHUNK_BYTES)
    assert not {it.name for it in sealed.chunks()} & {it.name for it in (tmp_path / "again" / "chunks").iterdir()}


def test_storage_sees_no_name_and_no_content(sealed: Sealed) -> None:
    stored = b"".join(it.read_bytes() for it in [*sealed.chunks(), sealed.folder / "manifest"])
    for name, content in FILES.items():
        assert name.encode() not in stored
        assert len(content) < 16 or content[:16] not in stored
    assert sealed.key.secret.view.tobytes() not in stored


def test_links_of_the_hubs_cache_are_followed_and_others_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, {"hub/blobs/1234": b"weights", "hub/snapshots/abcd/config.json": b"{}", "secret": b"key"})
    snapshot = tmp_path / "hub" / "snapshots" / "abcd"
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    digest = seal(snapshot, str(tmp_path / "bundle"), key=KEY, signer=SIGNER)
    bundle = Bundle.open(str(tmp_path / "bundle"), key=KEY, manifest_digest=digest, signers=SIGNERS)
    assert bundle.read_file("model.safetensors") == b"weights"
    (snapshot / "notes").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="outside of what is sealed"):
        seal(snapshot, str(tmp_path / "another"), key=KEY, signer=SIGNER)
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("made", ["pipe", "folder link", "no file", "a strange name", "nothing"])
def test_what_cannot_be_sealed_is_refused_before_anything_is_written(made: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if made == "pipe":
        os.mkfifo(source / "pipe")
    elif made == "folder link":
        (source / "link").symlink_to(tmp_path)
    elif made == "a strange name":
        (source / "new\nline").write_bytes(b"x")
    elif made == "nothing":
        source.rmdir()
    with pytest.raises(DataError):
        seal(source, str(tmp_path / "bundle"), key=KEY, signer=SIGNER)
    assert not (tmp_path / "bundle").exists()


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"a": bytes(64), "b": bytes(64)})

    def grow(_done: int, _total: int) -> None:
        with (source / "b").open("ab") as file:
            file.write(b"x")

    with pytest.raises(StorageError, match="was changed while it was sealed"):
        seal(source, str(tmp_path / "bundle"), key=KEY, signer=SIGNER, chunk_bytes=1, progress=grow)


def test_files_are_read_within_bounds(sealed: Sealed) -> None:
    bundle = sealed.open()
    with pytest.raises(IntegrityError, match="at most 47"):
        bundle.read_file("weights/a.bin", most_bytes=47)
    with pytest.raises(IntegrityError, match="holds no file"):
        bundle.read_file("weights/c.bin")
    with pytest.raises(IntegrityError, match="holds a model"):
        Bundle.open(
            str(sealed.folder), key=sealed.key, manifest_digest=sealed.digest, signers=sealed.signers, kind="data"
        )


def test_memory_does_not_grow_with_the_size(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "source", {"weights": bytes(48 << 20)})
    tracemalloc.start()
    try:
        digest = seal(source, str(tmp_path / "bundle"), key=KEY, signer=SIGNER, chunk_bytes=1 << 20)
        Bundle.open(str(tmp_path / "bundle"), key=KEY, manifest_digest=digest, signers=SIGNERS).check()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20  # buffers of a chunk: two for each of 8 threads at most, and what Python has besides


def test_the_key_file_is_for_its_owner_alone(tmp_path: Path, sealed: Sealed) -> None:
    path = tmp_path / "bundle.key"
    KeyFile(sealed.key, sealed.digest, next(iter(sealed.signers)), "model").write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    kept = KeyFile.read(path)
    assert kept.key.secret == sealed.key.secret
    assert kept.manifest_digest == sealed.digest
    assert sealed.key.secret.view.hex() not in repr(kept)
    with pytest.raises(FileExistsError):
        kept.write(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="open to others"):
        KeyFile.read(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"version":1,"kind":"model","key":"00"}', b"\xff" * 9000])
def test_what_is_no_key_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="no key file"):
        KeyFile.read(path)


def test_a_model_is_checked_before_long_work(tmp_path: Path) -> None:
    from obfuscatune.assets import tiny_model_path

    source_module.check_model(tiny_model_path())
    weights = (tiny_model_path() / "model.safetensors").read_bytes()
    config = (tiny_model_path() / "config.json").read_bytes()
    wrong: dict[str, dict[str, bytes]] = {
        "config.json cannot be read": {"model.safetensors": weights},
        "is no JSON$": {"config.json": b"{", "model.safetensors": weights},
        "no model_type": {"config.json": b"{}", "model.safetensors": weights},
        "model.safetensors cannot be read": {"config.json": config},
        "cut short": {"config.json": config, "model.safetensors": weights[:-1]},
        "no safetensors file": {"config.json": config, "model.safetensors": b"\xff" * 64},
        "00002.safetensors cannot be read": {
            "config.json": config,
            "model.safetensors.index.json": b'{"weight_map": {"a": "00001.safetensors", "b": "00002.safetensors"}}',
            "00001.safetensors": weights,
        },
    }
    for number, (said, files) in enumerate(wrong.items()):
        with pytest.raises(ModelFileError, match=said):
            source_module.check_model(write_tree(tmp_path / str(number), files))
