"""Writes tests/sealing/vectors.json: one bundle byte for byte, and manifests that must be refused.

    python scripts/make_bundle_vectors.py > tests/sealing/vectors.json

The refused ones were made by somebody who has the key and the signing key: nothing but the rule that they break refuses
them. Another implementation of docs/spec/bundle.md reads the same file.
"""

import base64
import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune import documents
from obfuscatune.sealing.blobs import _seal_with_salt
from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.manifest import MAX_CHUNK_BYTES, Manifest
from obfuscatune.sealing.seal import seal_files
from obfuscatune.sealing.source import look_through
from obfuscatune.sealing.storage import LocalStorage
from obfuscatune.secret_memory import SecretBytes

KEY = bytes(range(32))
BUNDLE_ID = bytes(range(16))
SIGNER_SEED = bytes([7]) * 32
SALT = bytes(range(32, 64))
CHUNK_BYTES = 16
FILES = {"config.json": b"{}", "empty": b"", "w/a.bin": bytes(range(48)), "w/b.bin": bytes(range(48, 96))}
Document = dict[str, Any]


def stored_manifest(document: Document, *, purpose: str = "bundle/v1", version: int = 1) -> bytes:
    """A manifest object around any document, by whoever has both keys."""
    key = BundleKey(SecretBytes(KEY))
    signed = documents.sign(document, purpose, Ed25519PrivateKey.from_private_bytes(SIGNER_SEED))
    header = b"OTBUNDLE" + version.to_bytes(2, "big") + BUNDLE_ID + key.commitment(BUNDLE_ID)
    return header + key.manifest_cipher(BUNDLE_ID).encrypt(bytes(12), documents.canonical(signed), header)


def refused(document: Document) -> Iterator[tuple[str, str, bytes]]:
    """Why, a part of the error's text, and the manifest."""
    changes: list[tuple[str, str, Callable[[Document], Any]]] = [
        ("an unknown field", "expected an object with", lambda it: it.update(more=1)),
        ("a missing field", "expected an object with", lambda it: it.pop("kind")),
        ("another version", "unknown version or kind", lambda it: it.update(version=2)),
        ("another kind", "unknown version or kind", lambda it: it.update(kind="code")),
        ("another bundle's id", "signed for another bundle", lambda it: it.update(bundle="00" * 16)),
        ("another key's commitment", "signed for another bundle", lambda it: it.update(commitment="00" * 32)),
        ("chunks of no bytes", "expected a number", lambda it: it.update(chunk_bytes=0)),
        ("chunks too large", "expected a number", lambda it: it.update(chunk_bytes=MAX_CHUNK_BYTES + 1)),
        ("a truth value for a number", "expected a number", lambda it: it.update(chunk_bytes=True)),
        ("no files", "lists 1 to", lambda it: it.update(files=[])),
        ("files that are no list", "lists 1 to", lambda it: it.update(files={})),
        ("a size below zero", "expected a number", lambda it: it["files"][1].update(bytes=-1)),
        ("a size beyond the limit", "expected a number", lambda it: it["files"][1].update(bytes=2**44 + 1)),
        ("a file with an unknown field", "expected an object with", lambda it: it["files"][0].update(mode=0)),
        ("files out of order", "not in order", lambda it: it["files"].reverse()),
        ("one name twice", "not in order", lambda it: it["files"][3].update(name="w/a.bin")),
        ("a file that is a folder too", "both a file and a folder", lambda it: it["files"][1].update(name="w")),
        ("a name that is no string", "no string", lambda it: it["files"][0].update(name=1)),
        ("a chunk too few", "not as many chunks", lambda it: it["files"][2]["chunks"].pop()),
        ("a chunk too many", "not as many chunks", lambda it: it["files"][2]["chunks"].append("0" * 64)),
        ("an empty file without its chunk", "not as many chunks", lambda it: it["files"][1].update(chunks=[])),
        ("one chunk twice", "one chunk twice", lambda it: _give(it, (2, 0), (2, 1))),
        ("one chunk in two files", "one chunk twice", lambda it: _give(it, (2, 0), (3, 0))),
        ("a chunk's name in capitals", "not named by a SHA-256", lambda it: _rename(it, str.upper)),
        ("a chunk's name with a path", "not named by a SHA-256", lambda it: _rename(it, lambda n: "../" + n[3:])),
        ("chunks of a file in another order", "another place", lambda it: it["files"][2]["chunks"].reverse()),
        ("chunks of two files swapped", "another place", _swap),
        ("a file cut at the end of a chunk", "another place", _cut),
        ("a file moved to another's index", "another place", lambda it: it["files"].pop(0)),
    ]
    for name in ("", ".", "..", "../x", "/x", "x/", "x//y", "x/../y", "x\\y", "x\0y", "x\ny", "x\u202ey", "y" * 256):
        changes.append((f"the name {name[:9]!r}", "no name", partial(_call, name)))
    for why, says, change in changes:
        changed = copy.deepcopy(document)
        change(changed)
        yield why, says, stored_manifest(changed)
    yield "signed for another purpose", "not for bundle/v1", stored_manifest(document, purpose="bundle/v2")
    yield "a header of another version", "version 2", stored_manifest(document, version=2)
    valid = stored_manifest(document)
    yield "another magic", "no manifest", b"X" + valid[1:]
    yield "a header alone", "no manifest", valid[:58]
    yield "a commitment of another key", "the key is not the one", valid[:26] + bytes(32) + valid[58:]
    yield "a changed byte", "was changed", valid[:-1] + bytes([valid[-1] ^ 1])
    yield "a byte at the end", "was changed", valid + b"\0"


def _call(name: str, document: Document) -> None:
    document["files"][0]["name"] = name


def _give(document: Document, source: tuple[int, int], target: tuple[int, int]) -> None:
    files = document["files"]
    files[target[0]]["chunks"][target[1]] = files[source[0]]["chunks"][source[1]]


def _rename(document: Document, change: Callable[[str], str]) -> None:
    document["files"][2]["chunks"][0] = change(document["files"][2]["chunks"][0])


def _swap(document: Document) -> None:
    first, second = document["files"][2]["chunks"], document["files"][3]["chunks"]
    first[0], second[0] = second[0], first[0]


def _cut(document: Document) -> None:
    document["files"][2]["chunks"].pop()
    document["files"][2]["bytes"] -= CHUNK_BYTES


def make() -> Document:
    """All vectors, as a JSON document."""
    key, signer = BundleKey(SecretBytes(KEY)), Ed25519PrivateKey.from_private_bytes(SIGNER_SEED)
    with tempfile.TemporaryDirectory() as folder:
        source, bundle = Path(folder, "source"), Path(folder, "bundle")
        for name, content in FILES.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
        storage = LocalStorage(bundle)
        storage.create()
        empty = Manifest("model", BUNDLE_ID, CHUNK_BYTES, ())
        digest = seal_files(look_through(source), storage, key, signer, empty, lambda _done, _total: None)
        objects = {name: (bundle / name).read_bytes() for name in sorted(storage.objects())}
    stored = objects["manifest"]
    plain = key.manifest_cipher(BUNDLE_ID).decrypt(bytes(12), stored[58:], stored[:58])
    document = json.loads(plain)["document"]
    return {
        "key": KEY.hex(),
        "signer": signer.public_key().public_bytes_raw().hex(),
        "manifest_digest": digest,
        "manifest_document": document,
        "files": {name: _base64(content) for name, content in FILES.items()},
        "objects": {name: _base64(content) for name, content in objects.items()},
        "refused": [
            {"why": why, "error": "IntegrityError", "says": says, "digest": _sha256(it), "manifest": _base64(it)}
            for why, says, it in refused(document)
        ],
        "blob": {
            "key": KEY.hex(),
            "purpose": "job",
            "name": "ftjob-1",
            "data": _base64(b"a row"),
            "sealed": _base64(_seal_with_salt(KEY, b"a row", "job", "ftjob-1", SALT)),
        },
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    json.dump(make(), sys.stdout, indent=1)
    sys.stdout.write("\n")
