"""Bundles at s3://, with a real server that speaks S3: sealed, opened, and held against whoever owns the bucket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.cli import app
from obfuscatune.errors import IntegrityError, StorageError
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.opening import Bundle
from obfuscatune.sealing.seal import seal
from tests.sealing.bundles import CHUNK_BYTES, FILES, write_tree

s3fs = pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto, which speaks S3, is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # botocore keeps its connections
]
WHERE = "s3://models/llama"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A fresh bucket, and its owner's way to it. The rest of the program knows of it by the environment alone."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    owner = s3fs.S3FileSystem(use_listings_cache=False)
    owner.mkdir("models")
    yield owner
    owner.rm("models", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


class Sealed:
    def __init__(self, folder: Path) -> None:
        self.source = write_tree(folder / "source", FILES)
        self.key, self.signer = BundleKey.generate(), Ed25519PrivateKey.generate()
        self.digest = seal(self.source, WHERE, key=self.key, signer=self.signer, chunk_bytes=CHUNK_BYTES)

    def check(self) -> None:
        for filesystem in list(s3fs.S3FileSystem._cache.values()):
            filesystem.invalidate_cache()  # as a process of its own
        signers = {self.signer.public_key().public_bytes_raw().hex()}
        bundle = Bundle.open(WHERE, key=self.key, manifest_digest=self.digest, signers=signers)
        assert {name: bundle.read_file(name) for name in bundle.files} == FILES
        bundle.check()


def test_a_bundle_is_sealed_to_a_bucket_and_opened_from_it(bucket: Any, tmp_path: Path) -> None:
    made = Sealed(tmp_path)
    made.check()
    names = bucket.find("models/llama")
    assert "models/llama/manifest" in names
    assert all(name.startswith("models/llama/chunks/") for name in names if not name.endswith("manifest"))
    for name in names:
        assert b"gpt2" not in bucket.cat_file(name)
    with pytest.raises(StorageError, match="not empty"):
        Sealed(tmp_path / "again")


@pytest.mark.long
def test_what_the_bucket_s_owner_does_is_noticed(bucket: Any, tmp_path: Path) -> None:
    made = Sealed(tmp_path)
    first, second = bucket.find("models/llama/chunks")[:2]
    manifest, more = "models/llama/manifest", "models/llama/chunks/more"
    content = bucket.cat_file(first)
    changed = {
        "longer": content + b"x",
        "shorter": content[:-1],
        "swapped": bucket.cat_file(second),
        "flipped": bytes([content[0] ^ 1]) + content[1:],
    }
    for what in changed.values():
        bucket.pipe_file(first, what)
        with pytest.raises(IntegrityError):
            made.check()
    bucket.pipe_file(first, content)
    bucket.pipe_file(more, b"x")
    with pytest.raises(IntegrityError):
        made.check()
    bucket.rm_file(more)
    made.check()
    for name in (first, manifest):
        kept = bucket.cat_file(name)
        bucket.rm_file(name)
        with pytest.raises(IntegrityError, match="missing"):
            made.check()
        bucket.pipe_file(name, kept)
    made.check()


@pytest.mark.long
def test_a_bucket_that_refuses_is_a_storage_error_without_secrets(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sealed(tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")  # where nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError) as caught:
        made.check()
    assert str(caught.value).startswith("s3://models/llama: ")
    assert "hunter2" not in str(caught.value)


def test_the_commands_take_a_bucket(bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["keygen", "--out", str(tmp_path / "keys")]) == 0
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    key = str(tmp_path / "data.key")
    sealing = ["owner", "seal", str(tmp_path / "train.jsonl"), "-o", "s3://models/data"]
    assert app.run([*sealing, "--identity", str(tmp_path / "keys"), "--key-out", key]) == 0
    assert app.run(["owner", "unseal", "s3://models/data", "--key", key, "-o", str(tmp_path / "out")]) == 0
    assert "every byte is as it was sealed" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
