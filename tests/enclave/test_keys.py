"""Secrets against independent computations: HKDF by RFC 5869, AES-CTR by SP 800-38A, deviates by their moments."""

from __future__ import annotations

import copy
import hashlib
import hmac
import math
import os
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune import RootKey
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.errors import ConfigError, StorageError

KEY = RootKey(bytes(range(32)))


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, written from its text."""
    pseudo_random_key = hmac.digest(salt or bytes(32), secret, hashlib.sha256)
    block, output = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudo_random_key, block + info + bytes([counter]), hashlib.sha256)
        output += block
    return output[:length]


def test_our_hkdf_is_that_of_the_rfc() -> None:
    """RFC 5869, appendix A.1."""
    found = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert found.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


@pytest.mark.parametrize("parts", [(), ("model", 0, "layers.0", "in"), ("é", 7)])
def test_streams_are_derived_by_hkdf(parts: tuple[str | int, ...]) -> None:
    fields = [b"obfuscatune/keys/v1", b"transform", *(str(part).encode() for part in parts)]
    info = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    expected = SecretStream(hkdf(bytes(range(32)), b"", info, 32))
    assert KEY.stream("transform", *parts).random_bytes(64) == expected.random_bytes(64)


def test_stream_is_aes_256_ctr() -> None:
    """The first block enciphers the counter zero (NIST CAVP, ECBKeySbox256, count 0), the second the counter one."""
    keysbox = SecretStream(bytes.fromhex("c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558"))
    assert keysbox.random_bytes(16).hex() == "46f2fb342d6f0ab477476fc501242c5f"
    # openssl enc -aes-256-ctr -K 603deb…dff4 -iv 0 < 32 zero bytes
    stream = SecretStream(bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"))
    assert stream.random_bytes(32).hex() == "e568f68194cf76d6174d4cc04310a85491151e5d0b7a1f1bc0d7acd0ae3e51e4"


@given(st.lists(st.integers(0, 70), max_size=6))
def test_draws_advance_the_stream(sizes: list[int]) -> None:
    piecewise, whole = KEY.stream("p"), KEY.stream("p")
    assert b"".join(piecewise.random_bytes(size) for size in sizes) == whole.random_bytes(sum(sizes))


# fields are length-prefixed, so no two lists of parts run into one
DISTINCT = [("a",), ("b",), ("a", 0), ("a", 1), ("a", "b"), ("ab",), ("a", "", "b"), ("a", "b", "")]


def test_every_purpose_has_its_own_stream() -> None:
    streams = {KEY.stream(purpose, *parts).random_bytes(16) for purpose in ("x", "y") for parts in DISTINCT}
    assert len(streams) == 2 * len(DISTINCT)
    assert KEY.stream("x", 1).random_bytes(16) != RootKey(bytes(32)).stream("x", 1).random_bytes(16)


def test_fresh_streams_are_fresh() -> None:
    assert SecretStream.fresh().random_bytes(16) != SecretStream.fresh().random_bytes(16)
    assert RootKey.generate().stream("x").random_bytes(16) != RootKey.generate().stream("x").random_bytes(16)


def test_a_forked_process_draws_otherwise() -> None:
    """Else two processes would mix different rows alike, and the worker see the difference."""
    stream, kept = SecretStream.fresh(), KEY.stream("kept")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child runs no torch
        child = os.fork()
    if not child:
        os.write(writer, stream.random_bytes(16) + kept.random_bytes(16))
        os._exit(0)
    os.waitpid(child, 0)
    drawn = os.read(reader, 32)
    os.close(reader)
    os.close(writer)
    assert drawn[:16] != stream.random_bytes(16)
    assert drawn[16:] == kept.random_bytes(16)  # what follows from the root key is the same everywhere


@pytest.mark.parametrize("size", [0, 1, 2, 67, 4096])
def test_permutations_are_permutations(size: int) -> None:
    permutation = KEY.stream("permutation", size).permutation(size)
    assert permutation.dtype == torch.int64
    assert torch.equal(permutation.sort().values, torch.arange(size))


def test_permutations_are_uniform() -> None:
    """The six orders of three, 6000 draws: each within five standard deviations of 1000."""
    stream = KEY.stream("uniform")
    orders = [tuple(stream.permutation(3).tolist()) for _ in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts) < 5 * math.sqrt(6000 * 5 / 36)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normal_moments(dtype: torch.dtype) -> None:
    """Moments 1 to 4 and the two halves' correlation, each within five standard deviations."""
    count = 1_000_000
    x = KEY.stream("normal").normal(count, dtype=dtype)
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    x = x.double()
    expected = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # power: mean, variance of it
    for power, (mean, variance) in expected.items():
        assert x.pow(power).mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    correlation = (x[: count // 2] * x[count // 2 :]).mean().item()
    assert abs(correlation) < 5 / math.sqrt(count / 2)
    squares = (x[: count // 2].pow(2) * x[count // 2 :].pow(2)).mean().item()
    assert squares == pytest.approx(1, abs=5 * math.sqrt(8 / (count / 2)))


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 3), (5, 0, 2)])
def test_normal_of_any_shape(shape: tuple[int, ...]) -> None:
    assert KEY.stream("shape").normal(*shape).shape == shape


def test_secrets_do_not_show() -> None:
    secret = RootKey(b"s3cret-key-of-thirty-two-bytes!!")
    assert repr(secret) == str(secret) == "RootKey(<redacted>)"
    assert repr(secret.stream("x")) == "SecretStream(<redacted>)"
    assert not hasattr(secret, "__dict__")


@pytest.mark.parametrize("serialise", [pickle.dumps, copy.copy, copy.deepcopy])
def test_root_keys_are_not_serialised(serialise: object) -> None:
    with pytest.raises(TypeError, match="not serialised"):
        serialise(KEY)  # type: ignore[operator]


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_keys_of_the_wrong_length(size: int) -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        RootKey(bytes(size))


def test_key_file_is_made_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    made = RootKey.from_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 32
    assert RootKey.from_file(path).stream("x").random_bytes(16) == made.stream("x").random_bytes(16)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_key_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root.key"
    path.write_bytes(bytes(32))
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        RootKey.from_file(path)


def test_key_file_of_the_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    path.write_bytes(bytes(31))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 bytes"):
        RootKey.from_file(path)


@pytest.mark.parametrize("place", ["absent/root.key", ""])
def test_key_file_that_cannot_be(tmp_path: Path, place: str) -> None:
    """No such folder; a folder itself."""
    path = tmp_path / place
    path.chmod(0o700) if path.is_dir() else None
    with pytest.raises(StorageError, match="key file"):
        RootKey.from_file(path)


def test_a_full_disk_leaves_no_key_file(tmp_path: Path) -> None:
    """A process that may write no file over 10 bytes stands for a full disk. Half a key would be refused for ever."""
    path = tmp_path / "root.key"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write the key file"):
            RootKey.from_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
