"""One piece of the work of `bench seal`, in a process of its own: its time, and the most memory that it ever held.

    python -m obfuscatune.bench.sealing_process WORK FOLDER

`FOLDER` holds `source/weights.bin` and, once they were made, `sealed.bin` (AES-GCM alone), `bundle/` and `bundle.key`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from obfuscatune.bench.processes import peak_bytes
from obfuscatune.sealing.key_file import KeyFile
from obfuscatune.sealing.keys import TAG_BYTES, BundleKey
from obfuscatune.sealing.opening import Bundle
from obfuscatune.sealing.seal import CHUNK_BYTES, seal

_CIPHER = AESGCM(bytes(32))
"""Of what is measured beside a bundle: nothing secret is encrypted."""


def main() -> None:
    """Do it, and print what it took as a line of JSON."""
    work, folder = WORKS[sys.argv[1]], Path(sys.argv[2])
    cpu, began = time.process_time(), time.perf_counter()
    work(folder)
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    sys.stdout.write(json.dumps(took | {"peak_bytes": peak_bytes()}) + "\n")


def _seal(folder: Path) -> None:
    key, signer = BundleKey.generate(), Ed25519PrivateKey.generate()
    digest = seal(folder / "source", str(folder / "bundle"), key=key, signer=signer)
    KeyFile(key, digest, signer.public_key().public_bytes_raw().hex(), "model").write(folder / "bundle.key")


def _bundle(folder: Path) -> Bundle:
    kept = KeyFile.read(folder / "bundle.key")
    return Bundle.open(
        str(folder / "bundle"), key=kept.key, manifest_digest=kept.manifest_digest, signers={kept.signer}
    )


def _open(folder: Path) -> None:
    _bundle(folder).check()


def _open_into_memory(folder: Path) -> None:
    _bundle(folder).load_into_memory().close()


def _encrypt_in_memory(folder: Path) -> None:
    plain, sealed = memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
    for number in range((folder / "source" / "weights.bin").stat().st_size // CHUNK_BYTES):
        _CIPHER.encrypt_into(number.to_bytes(12, "big"), plain, None, sealed)


def _decrypt_in_memory(folder: Path) -> None:
    plain = memoryview(bytearray(CHUNK_BYTES))
    sealed = _CIPHER.encrypt(bytes(12), plain, None)
    for _ in range((folder / "source" / "weights.bin").stat().st_size // CHUNK_BYTES):
        _CIPHER.decrypt_into(bytes(12), sealed, None, plain)


def _encrypt_file(folder: Path) -> None:
    room = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
    with (folder / "sealed.bin").open("wb", buffering=0) as out:
        for number, plain in enumerate(_pieces(folder / "source" / "weights.bin", CHUNK_BYTES)):
            sealed = room[: len(plain) + TAG_BYTES]
            _CIPHER.encrypt_into(number.to_bytes(12, "big"), plain, None, sealed)
            out.write(sealed)


def _decrypt_file(folder: Path) -> None:
    room = memoryview(bytearray(CHUNK_BYTES))
    for number, sealed in enumerate(_pieces(folder / "sealed.bin", CHUNK_BYTES + TAG_BYTES)):
        _CIPHER.decrypt_into(number.to_bytes(12, "big"), sealed, None, room[: len(sealed) - TAG_BYTES])


def _copy(folder: Path, *, to_disk: bool = False) -> None:
    with (folder / "copy.bin").open("wb", buffering=0) as out:
        for piece in _pieces(folder / "source" / "weights.bin", CHUNK_BYTES):
            out.write(piece)
        if to_disk:
            os.fsync(out.fileno())


def _pieces(path: Path, length: int) -> Iterator[memoryview]:
    room = memoryview(bytearray(length))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            yield room[:count]


WORKS: dict[str, Callable[[Path], None]] = {
    "AES-GCM alone, encrypt in memory": _encrypt_in_memory,
    "AES-GCM alone, encrypt a file": _encrypt_file,
    "seal": _seal,
    "AES-GCM alone, decrypt in memory": _decrypt_in_memory,
    "AES-GCM alone, decrypt a file": _decrypt_file,
    "open": _open,
    "open into memory": _open_into_memory,
    "copy a file": _copy,
    "copy a file, until it is on disk": lambda folder: _copy(folder, to_disk=True),
}
"""By name. AES-GCM alone is one thread; a bundle takes as many as there are cores."""

if __name__ == "__main__":
    main()
