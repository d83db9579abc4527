"""The manifest of a bundle: which files, in which chunks (docs/spec/bundle.md, sections 3 and 4).

What reads it touches neither disk nor network. Everything in it is checked before any of it is used.
"""

import hashlib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune import documents
from obfuscatune.errors import IntegrityError
from obfuscatune.sealing.keys import TAG_BYTES, BundleKey

KINDS = ("model", "data", "adapter")
MAGIC = b"OTBUNDLE"
VERSION = 1
ID_BYTES = 16
COMMITMENT_BYTES = 32
HEADER_BYTES = len(MAGIC) + 2 + ID_BYTES + COMMITMENT_BYTES
_NONCE = bytes(12)
"""Of the manifest, whose key encrypts nothing else."""
_PURPOSE = "bundle/v1"

MAX_MANIFEST_BYTES = HEADER_BYTES + documents.MOST_BYTES + TAG_BYTES
"""Of the object: about a terabyte of files in chunks of 4 MiB."""
MAX_CHUNK_BYTES = 16 * 2**20
"""Of a chunk before encryption. Each thread holds two of them."""
MAX_FILES = 65_536
MAX_FILE_BYTES = 2**44
MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
"""Of a file's or a folder's name: what file systems take."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bundle."""

    index: int
    name: str
    """Relative, with `/` between folders."""
    size: int
    chunks: tuple[str, ...]
    """The names of its chunks' objects: SHA-256 of the encrypted bytes, in hex."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that was checked: no field of it need be checked again."""

    kind: str
    bundle_id: bytes
    chunk_bytes: int
    files: tuple[FileEntry, ...]

    def chunk_size(self, entry: FileEntry, index: int) -> int:
        """Bytes of a chunk before encryption."""
        return min(self.chunk_bytes, entry.size - index * self.chunk_bytes)


def chunk_count(size: int, chunk_bytes: int) -> int:
    """Chunks of a file. An empty file has one, which is empty."""
    return max(1, -(-size // chunk_bytes))


def chunk_nonce(chunk_index: int) -> bytes:
    """The counter that a chunk is encrypted with."""
    return chunk_index.to_bytes(12, "big")


def chunk_data(bundle_id: bytes, file_index: int, chunk_index: int, *, final: bool) -> bytes:
    """The associated data of a chunk: where it belongs."""
    place = file_index.to_bytes(4, "big") + chunk_index.to_bytes(8, "big")
    return b"obfuscatune/bundle/v1/chunk" + bundle_id + place + bytes([final])


def encode(manifest: Manifest, key: BundleKey, signer: Ed25519PrivateKey) -> bytes:
    """The manifest as it is stored: signed, then encrypted.

    Raises:
        ValueError: it has more files or chunks than a manifest may.
    """
    commitment = key.commitment(manifest.bundle_id)
    document = {
        "version": VERSION,
        "kind": manifest.kind,
        "bundle": manifest.bundle_id.hex(),
        "commitment": commitment.hex(),
        "chunk_bytes": manifest.chunk_bytes,
        "files": [{"name": it.name, "bytes": it.size, "chunks": list(it.chunks)} for it in manifest.files],
    }
    plain = documents.canonical(documents.sign(document, _PURPOSE, signer))
    if len(plain) > documents.MOST_BYTES or len(manifest.files) > MAX_FILES:
        raise ValueError("too many files or chunks for one manifest: seal larger chunks, or fewer files")
    header = MAGIC + VERSION.to_bytes(2, "big") + manifest.bundle_id + commitment
    return header + key.manifest_cipher(manifest.bundle_id).encrypt(_NONCE, plain, header)


def decode(stored: bytes, *, key: BundleKey, digest: str, signers: Set[str]) -> Manifest:
    """Check a stored manifest and read it.

    1. It is the one that `digest` names: not another, not an older one.
    2. Its header is one, and the key is the one that it was sealed with.
    3. It decrypts.
    4. One of `signers` signed it as a bundle's manifest.
    5. Header and signed document are of one bundle.
    6. Every field is in its range.

    Raises:
        IntegrityError: one of these does not hold.
    """
    if hashlib.sha256(stored).hexdigest() != digest:  # 1
        raise IntegrityError(
            "the manifest is not the one that was named by its digest: another bundle, or an older one"
        )
    header, sealed = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
    if len(stored) < HEADER_BYTES + TAG_BYTES or not header.startswith(MAGIC):  # 2
        raise IntegrityError("no manifest of a bundle")
    version = int.from_bytes(header[8:10], "big")
    if version != VERSION:
        raise IntegrityError(f"a bundle of version {version}; this program reads version {VERSION}")
    bundle_id, commitment = header[10 : 10 + ID_BYTES], header[10 + ID_BYTES :]
    if key.commitment(bundle_id) != commitment:
        raise IntegrityError("the key is not the one that this bundle was sealed with")
    try:  # 3
        plain = key.manifest_cipher(bundle_id).decrypt(_NONCE, sealed, header)
    except InvalidTag:
        raise IntegrityError("the manifest was changed") from None
    document = documents.verify(documents.parse(plain), _PURPOSE, set(signers))  # 4
    if document.get("bundle") != bundle_id.hex() or document.get("commitment") != commitment.hex():  # 5
        raise IntegrityError("the manifest was signed for another bundle or another key")
    return _checked(document, bundle_id)  # 6


def _checked(document: dict[str, Any], bundle_id: bytes) -> Manifest:
    _fields(document, {"version", "kind", "bundle", "commitment", "chunk_bytes", "files"})
    if document["version"] != VERSION or document["kind"] not in KINDS:
        raise IntegrityError("a manifest of an unknown version or kind")
    chunk_bytes = _number(document["chunk_bytes"], 1, MAX_CHUNK_BYTES)
    listed = document["files"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_FILES:
        raise IntegrityError(f"a manifest lists 1 to {MAX_FILES:,} files")
    files = tuple(_entry(index, it, chunk_bytes) for index, it in enumerate(listed))
    check_names([it.name for it in files])
    chunks = [name for it in files for name in it.chunks]
    if len(set(chunks)) != len(chunks):
        raise IntegrityError("the manifest lists one chunk twice")
    return Manifest(document["kind"], bundle_id, chunk_bytes, files)


def _entry(index: int, listed: Any, chunk_bytes: int) -> FileEntry:
    _fields(listed, {"name", "bytes", "chunks"})
    size, chunks = _number(listed["bytes"], 0, MAX_FILE_BYTES), listed["chunks"]
    if not isinstance(listed["name"], str):
        raise IntegrityError("a file's name is no string")
    if not isinstance(chunks, list) or len(chunks) != chunk_count(size, chunk_bytes):
        raise IntegrityError("a file has not as many chunks as its size takes")
    if not all(map(documents.is_hex, chunks)):
        raise IntegrityError("a chunk is not named by a SHA-256")
    return FileEntry(index, listed["name"], size, tuple(chunks))


def check_names(names: list[str]) -> None:
    """Check that all these files may lie in one folder and nowhere else: sorted, each once, each beneath the folder.

    Raises:
        IntegrityError: they may not.
    """
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        if (
            not name.isprintable()  # nor has it surrogates, so that it has an encoding
            or "\\" in name
            or len(name.encode()) > MAX_NAME_BYTES
            or any(part in ("", ".", "..") or len(part.encode()) > MAX_PART_BYTES for part in parts)
        ):
            raise IntegrityError(f"{name!r:.80} is no name that a file of a bundle may have")
        folders.update(str(parent) for parent in PurePosixPath(name).parents)
    if names != sorted(set(names)):
        raise IntegrityError("the files' names are not in order, or one is there twice")
    if both := folders & set(names):
        raise IntegrityError(f"{min(both)!r:.80} is both a file and a folder")


def _fields(value: Any, names: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != names:
        raise IntegrityError(f"expected an object with {', '.join(sorted(names))}")


def _number(value: Any, least: int, most: int) -> int:
    if not documents.is_whole(value, least, most):
        raise IntegrityError(f"expected a number from {least} to {most:,}")
    return value
