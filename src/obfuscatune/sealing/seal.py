"""A folder becomes a bundle: read, encrypted, named and stored chunk by chunk, the manifest last."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from obfuscatune.errors import DataError
from obfuscatune.sealing.keys import TAG_BYTES, BundleKey
from obfuscatune.sealing.manifest import (
    ID_BYTES,
    MAX_CHUNK_BYTES,
    FileEntry,
    Manifest,
    chunk_count,
    chunk_data,
    chunk_nonce,
    encode,
)
from obfuscatune.sealing.parallel import Buffers, in_threads
from obfuscatune.sealing.source import SourceFile, look_through
from obfuscatune.sealing.storage import Storage, open_storage

Kind = Literal["model", "data", "adapter"]
Progress = Callable[[int, int], None]
"""Called with the bytes done since the last call, and with all that there are."""
CHUNK_BYTES = 4 * 2**20


class _Chunk(NamedTuple):
    source: SourceFile
    cipher: AESGCM
    file: int
    number: int
    last: int


def seal(
    source: Path,
    storage: str,
    *,
    key: BundleKey,
    signer: Ed25519PrivateKey,
    kind: Kind = "model",
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> str:
    """Seal a folder, or a file, into a bundle.

    Memory is bounded by chunks and threads, whatever the size. The manifest is written last: what is interrupted
    is no bundle. After an error the chunks that were written are removed.

    Args:
        source: all files beneath it are sealed, whatever their names.
        storage: an empty or new folder, or a URL (`storage.PROTOCOLS`).
        key: may seal several bundles.
        signer: whose bundle it is.
        chunk_bytes: of plain text in a chunk, 1 to 16 MiB.

    Returns:
        The SHA-256 of the manifest, in hex: the bundle's name in a grant.

    Raises:
        DataError: the source cannot be sealed, or in no so small chunks.
        StorageError: the source or the storage cannot be used, or the source changes meanwhile.
        ConfigError: the storage's URL is of no kind that is read.
    """
    if not 1 <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"chunk_bytes: expected 1 to {MAX_CHUNK_BYTES}, found {chunk_bytes}")
    sources = look_through(source)
    stored = open_storage(storage)
    stored.create()
    return seal_files(
        sources, stored, key, signer, Manifest(kind, os.urandom(ID_BYTES), chunk_bytes, ()), progress or _no_progress
    )


def seal_files(
    sources: tuple[SourceFile, ...],
    storage: Storage,
    key: BundleKey,
    signer: Ed25519PrivateKey,
    empty: Manifest,
    progress: Progress,
) -> str:
    """Seal the files under a manifest that lists none yet; its bundle id must never have been used with this key."""
    buffers = Buffers(empty.chunk_bytes)
    total = sum(it.size for it in sources)
    written: list[list[str]] = [[] for _ in sources]
    begun: set[str] = set()

    def seal_chunk(chunk: _Chunk) -> tuple[int, str, int]:
        offset = chunk.number * empty.chunk_bytes
        size = min(empty.chunk_bytes, chunk.source.size - offset)
        plain, sealed = buffers.plain[:size], buffers.sealed[: size + TAG_BYTES]
        chunk.source.read_into(plain, offset)
        place = chunk_data(empty.bundle_id, chunk.file, chunk.number, final=chunk.number == chunk.last)
        chunk.cipher.encrypt_into(chunk_nonce(chunk.number), plain, place, sealed)
        name = hashlib.sha256(sealed).hexdigest()
        begun.add(name)
        storage.write_chunk(name, sealed)
        return chunk.file, name, size

    def chunks() -> Iterator[_Chunk]:
        for file, source in enumerate(sources):
            cipher = key.file_cipher(empty.bundle_id, file)
            last = chunk_count(source.size, empty.chunk_bytes) - 1
            yield from (_Chunk(source, cipher, file, number, last) for number in range(last + 1))

    try:
        with closing(in_threads(seal_chunk, chunks())) as results:
            for file, name, size in results:
                written[file].append(name)
                progress(size, total)
        entries = zip(sources, written, strict=True)
        files = tuple(FileEntry(i, it.name, it.size, tuple(names)) for i, (it, names) in enumerate(entries))
        try:
            manifest = encode(replace(empty, files=files), key, signer)
        except ValueError as error:
            raise DataError(str(error)) from None
        storage.write_manifest(manifest)
    except BaseException:  # an interruption too
        storage.remove(begun)
        raise
    return hashlib.sha256(manifest).hexdigest()


def _no_progress(_done: int, _total: int) -> None:
    """Shows nothing."""
