"""The secrets that owners have released, in this process's memory alone; and what is derived of them.

K_o        seals an owner's rows and files
model key  opens a bundle; the provider releases it with a grant
job key    HKDF(K_o, model key): seals what a job makes of both, its checkpoints and its adapter

So an adapter opens only while both parties want it to. A restarted service has none of these.
"""

import threading

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import IntegrityError
from obfuscatune.sealing.blobs import open_blob, seal_blob
from obfuscatune.secret_memory import SecretBytes, secret_view

KEY_BYTES = 32


class Owner:
    """An owner whose key was released."""

    def __init__(self, spki: str, certificate: bytes, key: SecretBytes) -> None:
        """Raises IntegrityError: the key is not of 32 bytes."""
        if len(key) != KEY_BYTES:
            raise IntegrityError(f"an owner's key has {KEY_BYTES} bytes, not {len(key)}")
        self.spki = spki
        """SHA-256 of the public key of the owner's certificate, in hex."""
        self.certificate = certificate
        """PEM."""
        self.key = key

    def seal(self, data: bytes, purpose: str, name: str) -> bytes:
        """Seal under the owner's key, for one place."""
        return seal_blob(self.key, data, purpose=purpose, name=name)

    def open(self, sealed: bytes, purpose: str, name: str) -> bytes:
        """Open what `seal` sealed for that place.

        Raises:
            IntegrityError: it was sealed for another place or by another key, or was changed.
        """
        return open_blob(self.key, sealed, purpose=purpose, name=name)

    def __repr__(self) -> str:
        return f"Owner({self.spki})"


class Owners:
    """Those whose keys are here. Safe from any thread."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}
        self._lock = threading.Lock()

    def put(self, owner: Owner) -> None:
        """An owner's key came, for the first time or again."""
        with self._lock:
            self._owners[owner.spki] = owner

    def get(self, spki: str | None) -> Owner | None:
        """The owner with that key; None where it was not released."""
        with self._lock:
            return None if spki is None else self._owners.get(spki)

    def __len__(self) -> int:
        with self._lock:
            return len(self._owners)


def job_key(owner: Owner, model_key: SecretBytes, job: str) -> SecretBytes:
    """The key that seals what a job makes. Who has one of the two keys alone cannot derive it."""
    derived = SecretBytes.zeros(KEY_BYTES)
    with SecretBytes.zeros(2 * KEY_BYTES) as both, derived.writable() as room:
        with both.writable() as view, secret_view(owner.key) as first, secret_view(model_key) as second:
            view[:KEY_BYTES] = first
            view[KEY_BYTES:] = second
        with both.view as view:
            HKDF(SHA256(), KEY_BYTES, None, b"obfuscatune/job/v1/" + job.encode()).derive_into(view, room)
    return derived
