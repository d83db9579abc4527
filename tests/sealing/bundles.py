"""A small sealed bundle, and everything that opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from obfuscatune.sealing.keys import BundleKey
from obfuscatune.sealing.opening import Bundle

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "empty": b"",
    "weights/a.bin": bytes(range(48)),  # three full chunks of 16 bytes
    "weights/b.bin": bytes(range(100, 148)),
}
CHUNK_BYTES = 16


@dataclass(frozen=True)
class Sealed:
    """A bundle on a folder of an attacker's, and what its owner keeps."""

    folder: Path
    source: Path
    key: BundleKey
    signer: Ed25519PrivateKey
    digest: str

    @property
    def signers(self) -> set[str]:
        return {self.signer.public_key().public_bytes_raw().hex()}

    def open(self) -> Bundle:
        return Bundle.open(str(self.folder), key=self.key, manifest_digest=self.digest, signers=self.signers)

    def read_all(self) -> dict[str, bytes]:
        """Every file, as whoever uses the bundle reads it; nothing is checked for what is beside it."""
        bundle = self.open()
        return {name: bundle.read_file(name) for name in bundle.files}

    def chunks(self) -> list[Path]:
        return sorted((self.folder / "chunks").iterdir())


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
