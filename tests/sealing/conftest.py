"""A sealed bundle for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.seal import seal
from tests.sealing.bundles import CHUNK_BYTES, FILES, Sealed, write_tree


@pytest.fixture
def key() -> BundleKey:
    return BundleKey.generate()


@pytest.fixture
def signer() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def sealed(tmp_path: Path, key: BundleKey, signer: Ed25519PrivateKey) -> Sealed:
    source = write_tree(tmp_path / "source", FILES)
    digest = seal(source, str(tmp_path / "bundle"), key=key, signer=signer, chunk_bytes=CHUNK_BYTES)
    return Sealed(tmp_path / "bundle", source, key, signer, digest)
