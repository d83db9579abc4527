"""docs/spec/bundle.md: the vectors, and a reader of the format that shares nothing with ours but the primitives."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune import errors
from obfuscatune.errors import IntegrityError
from obfuscatune.sealing import manifest as manifest_module
from obfuscatune.sealing.blobs import open_blob
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.manifest import decode
from obfuscatune.sealing.opening import Bundle
from obfuscatune.secret_memory import SecretBytes
from scripts.make_bundle_vectors import make, stored_manifest

ROOT = Path(__file__).parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "tests/sealing/vectors.json").read_text("utf-8"))
OBJECTS = {name: base64.b64decode(it) for name, it in VECTORS["objects"].items()}
KEY = bytes.fromhex(VECTORS["key"])
SIGNERS = {VECTORS["signer"]}


def hkdf(salt: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869."""
    extracted, out, block = hmac.digest(salt, KEY, "sha256"), b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        out += block
    return out[:length]


def read_by_the_specification() -> dict[str, bytes]:
    stored = OBJECTS["manifest"]
    assert hashlib.sha256(stored).hexdigest() == VECTORS["manifest_digest"]
    assert stored[:10] == b"OTBUNDLE\0\1"
    bundle = stored[10:26]
    assert stored[26:58] == hkdf(bundle, b"obfuscatune/bundle/v1/commitment")
    cipher = AESGCM(hkdf(bundle, b"obfuscatune/bundle/v1/manifest"))
    signed = json.loads(cipher.decrypt(bytes(12), stored[58:], stored[:58]))
    document = signed["document"]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    message = b"obfuscatune/bundle/v1\0" + canonical
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed["key"])).verify(
        base64.b64decode(signed["signature"]), message
    )
    found = {}
    for file, entry in enumerate(document["files"]):
        cipher = AESGCM(hkdf(bundle, b"obfuscatune/bundle/v1/file" + file.to_bytes(4, "big")))
        parts = []
        for number, name in enumerate(entry["chunks"]):
            chunk = OBJECTS[f"chunks/{name}"]
            assert hashlib.sha256(chunk).hexdigest() == name
            final = bytes([number == len(entry["chunks"]) - 1])
            place = bundle + file.to_bytes(4, "big") + number.to_bytes(8, "big") + final
            parts.append(cipher.decrypt(number.to_bytes(12, "big"), chunk, b"obfuscatune/bundle/v1/chunk" + place))
        found[entry["name"]] = b"".join(parts)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chunks").mkdir()
    for name, content in OBJECTS.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def key() -> BundleKey:
    return BundleKey(SecretBytes(KEY))


def test_the_vectors_are_what_the_code_makes() -> None:
    assert make() == VECTORS


def test_a_reader_of_the_specification_and_ours_read_the_same(folder: Path) -> None:
    files = {name: base64.b64decode(it) for name, it in VECTORS["files"].items()}
    assert read_by_the_specification() == files
    bundle = Bundle.open(str(folder), key=key(), manifest_digest=VECTORS["manifest_digest"], signers=SIGNERS)
    assert {name: bundle.read_file(name) for name in bundle.files} == files


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda it: it["why"])
def test_what_must_be_refused_is(vector: dict[str, str], folder: Path) -> None:
    (folder / "manifest").write_bytes(base64.b64decode(vector["manifest"]))
    with pytest.raises(getattr(errors, vector["error"]), match=re.escape(vector["says"])):
        bundle = Bundle.open(str(folder), key=key(), manifest_digest=vector["digest"], signers=SIGNERS)
        for name in bundle.files:
            bundle.read_file(name)


def test_the_blob_of_the_vectors_opens() -> None:
    blob = VECTORS["blob"]
    sealed = base64.b64decode(blob["sealed"])
    assert open_blob(KEY, sealed, purpose="job", name="ftjob-1") == b"a row"
    derived = hkdf(sealed[1:33], b"obfuscatune/blob/v1", 44)
    place = b"obfuscatune/blob/v1" + b"\0\0\0\3job" + b"\0\0\0\7ftjob-1"
    assert sealed[:1] == b"\1"
    assert AESGCM(derived[:32]).decrypt(derived[32:], sealed[33:], place) == b"a row"


def test_the_specification_names_the_limits_that_the_code_has() -> None:
    text = (ROOT / "docs/spec/bundle.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert len(rows) == 6
    for name, value in rows.items():
        assert getattr(manifest_module, name) == int(value.replace(",", "")), name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(where=st.lists(st.integers(0, 9), max_size=4), value=json_values)
def test_any_value_anywhere_in_a_signed_manifest_is_read_or_refused(where: list[int], value: Any) -> None:
    document = json.loads(json.dumps(VECTORS["manifest_document"]))
    at: Any = document
    for step in where[:-1]:
        inner = at[sorted(at)[step % len(at)]] if isinstance(at, dict) else at[step % len(at)]
        if not isinstance(inner, dict | list) or not inner:
            break
        at = inner
    place = where[-1] % len(at) if where else 0
    at[sorted(at)[place] if isinstance(at, dict) else place] = value
    stored = stored_manifest(document)
    try:
        read = decode(stored, key=key(), digest=hashlib.sha256(stored).hexdigest(), signers=SIGNERS)
    except IntegrityError:
        return
    assert read.bundle_id == bytes(range(16))
    for entry in read.files:
        assert entry.size >= 0 and ".." not in entry.name.split("/")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=400), keep=st.integers(0, 58))
def test_any_bytes_are_refused(data: bytes, keep: int) -> None:
    stored = OBJECTS["manifest"][:keep] + data
    with pytest.raises(IntegrityError):
        decode(stored, key=key(), digest=hashlib.sha256(stored).hexdigest(), signers=SIGNERS)
