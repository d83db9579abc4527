"""A bundle and its key become files again: in memory, or where the caller wants them."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from obfuscatune.errors import IntegrityError, StorageError
from obfuscatune.sealing.keys import TAG_BYTES, BundleKey
from obfuscatune.sealing.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    chunk_data,
    chunk_nonce,
    decode,
)
from obfuscatune.sealing.memory_files import MemoryFiles, linked
from obfuscatune.sealing.parallel import Buffers, in_threads
from obfuscatune.sealing.seal import Kind, Progress
from obfuscatune.sealing.storage import CHUNKS, MANIFEST, Storage, chunk_label, open_storage

MAX_READ_BYTES = 64 * 2**20
"""Of a file that is read whole, unless a caller says more."""
_Sink = Callable[[FileEntry, int, memoryview], None]
"""Takes a piece of a file, and its offset there. The piece is overwritten afterwards."""


class _Chunk(NamedTuple):
    entry: FileEntry
    number: int
    cipher: AESGCM


class Bundle:
    """An opened bundle: its manifest was checked, its chunks are checked when they are read.

    Example:
        >>> bundle = Bundle.open("s3://models/llama", key=key, manifest_digest=digest, signers={signer})
        >>> with bundle.in_memory() as path:
        ...     model = obfuscatune.load(path, "unix:/run/worker.sock")
    """

    def __init__(self, storage: Storage, key: BundleKey, manifest: Manifest) -> None:
        """Not to be called: `open` checks the manifest."""
        self._storage, self._key, self._manifest = storage, key, manifest
        self._entries = {it.name: it for it in manifest.files}

    @classmethod
    def open(
        cls, storage: str, *, key: BundleKey, manifest_digest: str, signers: Set[str], kind: Kind | None = None
    ) -> "Bundle":
        """Read and check the manifest. No chunk is read yet.

        Args:
            storage: a folder or a URL, untrusted.
            key: what it was sealed with. It must stay open while files are read.
            manifest_digest: SHA-256 of the manifest, in hex, as `seal` returned it. No other version is opened.
            signers: Ed25519 public keys in hex, one of which must have signed.
            kind: what it must hold; None takes any.

        Raises:
            IntegrityError: it is not that bundle.
            StorageError: the storage cannot be read.
            ConfigError: the URL is of no kind that is read.
        """
        opened = open_storage(storage)
        stored = opened.read(MANIFEST, MAX_MANIFEST_BYTES)
        manifest = decode(stored, key=key, digest=manifest_digest, signers=signers)
        if kind is not None and manifest.kind != kind:
            raise IntegrityError(f"the bundle holds a {manifest.kind}, where a {kind} is expected")
        return cls(opened, key, manifest)

    @property
    def kind(self) -> str:
        """What the sealer said that it holds: model, data or adapter."""
        return self._manifest.kind

    @property
    def files(self) -> Mapping[str, int]:
        """Names and sizes in bytes. Names are relative, checked, with `/` between folders."""
        return MappingProxyType({it.name: it.size for it in self._manifest.files})

    def read_file(self, name: str, *, most_bytes: int = MAX_READ_BYTES) -> bytes:
        """A whole file.

        Raises:
            IntegrityError: there is no such file, it was changed, or is longer than `most_bytes`.
            StorageError: the storage cannot be read.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise IntegrityError(f"the bundle holds no file {name!r}")
        if entry.size > most_bytes:
            raise IntegrityError(f"{name} has {entry.size:,} bytes; at most {most_bytes:,} are read")
        found = bytearray(entry.size)

        def keep(_: FileEntry, offset: int, piece: memoryview) -> None:
            found[offset : offset + len(piece)] = piece

        self._read((entry,), keep)
        return bytes(found)

    def check(self, progress: Progress | None = None) -> None:
        """Read every chunk, and see that nothing else lies beside them.

        Raises:
            IntegrityError: a chunk is missing or changed, or there is an object that is not the bundle's.
            StorageError: the storage cannot be read, or does not list its objects.
        """
        named = {MANIFEST} | {f"{CHUNKS}/{name}" for it in self._manifest.files for name in it.chunks}
        if extra := self._storage.objects() - named:
            raise IntegrityError(f"{len(extra)} objects are not the bundle's, {min(extra)!r:.80} among them")
        self._read(self._manifest.files, _nowhere, progress)

    def extract(self, folder: Path, progress: Progress | None = None) -> None:
        """Write all files, decrypted, to a new folder, for this user alone. After an error it is left unfinished.

        Raises:
            IntegrityError: a chunk is missing or changed.
            StorageError: the storage cannot be read, the folder is there already or cannot be written.
        """
        try:
            folder.mkdir(mode=0o700, parents=True)
            for name in self._entries:
                (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

            def write(entry: FileEntry, offset: int, piece: memoryview) -> None:
                with (folder / entry.name).open("r+b", buffering=0) as file:
                    _write_all(file.fileno(), offset, piece)

            self._read(self._manifest.files, write, progress)
        except OSError as error:
            raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from error

    def load_into_memory(self, progress: Progress | None = None) -> MemoryFiles:
        """Decrypt all files into anonymous memory files, which the caller closes (see `memory_files`).

        Raises:
            IntegrityError: a chunk is missing or changed.
            StorageError: the storage cannot be read, or there is too little memory.
        """
        files = MemoryFiles(self.files)
        try:

            def write(entry: FileEntry, offset: int, piece: memoryview) -> None:
                _write_all(files.descriptors[entry.name], offset, piece)

            self._read(self._manifest.files, write, progress)
            files.seal()
        except BaseException as error:
            files.close()
            if isinstance(error, OSError):
                raise StorageError(f"cannot hold the bundle in memory: {error.strerror or error}") from error
            raise
        return files

    @contextlib.contextmanager
    def in_memory(self, progress: Progress | None = None) -> Iterator[Path]:
        """A folder that this process reads the files in as if they lay on disk. They lie in its memory alone.

        Each entry is a link to /proc/<this process>/fd/N, so others' processes cannot follow it, nor can any other
        once `forbid_dumps` was called. A child that shall read them is given `MemoryFiles.descriptors` and makes a
        folder of its own of them: see `memory_files.linked`.

        Where the system has swap, memory can be written to it: an enclave has none.

        Raises:
            IntegrityError, StorageError: as `load_into_memory` does.
        """
        with self.load_into_memory(progress) as files, linked(files.descriptors) as folder:
            yield folder

    def _read(self, entries: tuple[FileEntry, ...], sink: _Sink, progress: Progress | None = None) -> None:
        manifest, buffers = self._manifest, Buffers(self._manifest.chunk_bytes)
        total = sum(it.size for it in entries)

        def read_chunk(chunk: _Chunk) -> int:
            entry, number = chunk.entry, chunk.number
            size = manifest.chunk_size(entry, number)
            sealed, plain = buffers.sealed[: size + TAG_BYTES], buffers.plain[:size]
            name = entry.chunks[number]
            self._storage.read_chunk(name, sealed)
            if hashlib.sha256(sealed).hexdigest() != name:
                raise IntegrityError(f"{chunk_label(name)} was changed")
            place = chunk_data(manifest.bundle_id, entry.index, number, final=number == len(entry.chunks) - 1)
            try:
                chunk.cipher.decrypt_into(chunk_nonce(number), sealed, place, plain)
            except InvalidTag:
                raise IntegrityError(f"{chunk_label(name)} was sealed for another place") from None
            sink(entry, number * manifest.chunk_bytes, plain)
            return size

        def chunks() -> Iterator[_Chunk]:
            for entry in entries:
                cipher = self._key.file_cipher(manifest.bundle_id, entry.index)
                yield from (_Chunk(entry, number, cipher) for number in range(len(entry.chunks)))

        with contextlib.closing(in_threads(read_chunk, chunks())) as sizes:
            for size in sizes:
                if progress is not None:
                    progress(size, total)


def _write_all(descriptor: int, offset: int, piece: memoryview) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(descriptor, piece[done:], offset + done)


def _nowhere(_entry: FileEntry, _offset: int, _piece: memoryview) -> None:
    """Drops what was checked."""
