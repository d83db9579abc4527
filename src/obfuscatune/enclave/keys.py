"""All secrets of the enclave, from one root key.

    root key (32 bytes)
      └─ HKDF-SHA256, info = length-prefixed (label, purpose, parts…)   RFC 5869
           └─ AES-256-CTR key stream                                    NIST SP 800-38A
                └─ bytes, permutations, uniform and normal deviates

The same root key and the same parts give the same stream, hence the same W_star; nothing ever comes
from torch's or numpy's global generators. A stream's key is used for that one stream only, so the
counter may start at zero.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

from obfuscatune.enclave import kernels
from obfuscatune.enclave.kernels.reference import box_muller
from obfuscatune.errors import ConfigError, StorageError
from obfuscatune.protocol.files import read_secret, write_new

KEY_BYTES = 32
LABEL = b"obfuscatune/keys/v1"
PAIRS_TOGETHER = 16
"""Of float32 deviates, drawn at a time: as many as any processor computes at once."""
GRID_NORMALS_TOGETHER = 1 << 19
"""Masks that are drawn at a time, 4 MiB: the kernel reads the words from a cache, and threads are woken seldom."""
_BLOCK_BYTES = 16
_FROM_ZERO = modes.CTR(bytes(_BLOCK_BYTES))
_ZEROS = memoryview(bytes(1 << 16))


class RootKey:
    """The one secret from which a protected model's static matrices follow."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"a root key has {KEY_BYTES} bytes, this one {len(key)}")
        self._key = bytes(key)

    @classmethod
    def generate(cls) -> RootKey:
        """A fresh key from the operating system's CSPRNG."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_file(cls, path: Path) -> RootKey:
        """Read the key file, or make it (mode 0600) where there is none.

        Raises:
            ConfigError: the file is not 32 bytes long, or open to others, or another user's.
            StorageError: it cannot be read or written.
        """
        if not os.path.lexists(path):
            key = cls.generate()
            try:
                write_new(path, key._key)
                return key
            except FileExistsError:  # another process was faster
                pass
            except OSError as error:
                raise StorageError(f"cannot write the key file {path}: {error.strerror}") from error
        try:
            return cls(read_secret(path, "key file"))
        except OSError as error:
            raise StorageError(f"cannot read the key file {path}: {error.strerror}") from error

    def stream(self, purpose: str, *parts: str | int) -> SecretStream:
        """The key stream of one purpose, e.g. `("transform", model, epoch, layer, "in")`."""
        fields = [LABEL, purpose.encode(), *(str(part).encode() for part in parts)]
        info = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        derived = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self._key)
        return SecretStream(derived)

    def __repr__(self) -> str:
        return "RootKey(<redacted>)"

    def __reduce__(self) -> str:
        raise TypeError("a root key is not serialised; use a key file")


class SecretStream:
    """Numbers from a CSPRNG. Draws advance the stream; two streams of one key agree draw by draw.

    Safe from any thread: a model may be called from several at once, and the cipher refuses a second caller.
    """

    __slots__ = ("_cipher", "_lock")

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), _FROM_ZERO).encryptor()
        self._lock = threading.Lock()

    @staticmethod
    def fresh() -> FreshStream:
        """Numbers that nothing can repeat: for all that is drawn anew for each request."""
        return FreshStream()

    def random_bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        with self._lock:
            return self._cipher.update(bytes(count))

    def _words(self, count: int) -> NDArray[np.uint32]:
        """The next `count` words (count,), to be written over: no byte of them is copied."""
        size = 4 * count
        memory = np.empty(size + _BLOCK_BYTES, np.uint8)
        self._fill(memory, size)
        return memory[:size].view(np.uint32)

    def _fill(self, memory: NDArray[np.uint8], size: int) -> None:
        """Write the next `size` bytes into `memory`, which has room for a block more: the cipher asks for it."""
        with self._lock:
            for start in range(0, size, len(_ZEROS)):
                self._cipher.update_into(_ZEROS[: size - start], memory.data[start:])

    def permutation(self, size: int) -> Tensor:
        """A uniform permutation, int64 (size,): the order that sorts 64-bit keys.

        Two keys tie with probability below size² / 2⁶⁵; the sort is stable, so a tie only biases one swap.
        """
        keys = np.frombuffer(self.random_bytes(8 * size), dtype=np.uint64)
        return torch.from_numpy(np.argsort(keys, kind="stable"))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal deviates by Box and Muller (1958), float64 or float32.

        float32 draws from 24-bit uniforms, so its tails end at 5.8 standard deviations.
        """
        count = math.prod(shape)
        pairs = (count + 1) // 2
        deviates = self._normal_float64(pairs) if dtype == torch.float64 else self._normal_float32(pairs)
        return torch.from_numpy(deviates[:count].reshape(shape))

    def grid_normal(self, *shape: int, deviation: float, grid: float) -> Tensor:
        """Normal numbers of that standard deviation, multiples of `grid`, float64: see `kernels.grid_normal`."""
        count = math.prod(shape)
        drawn = -(-count // (2 * PAIRS_TOGETHER)) * 2 * PAIRS_TOGETHER
        memory = np.empty(8 * drawn + _BLOCK_BYTES, np.uint8)
        words = memory[: 8 * drawn].view(np.uint64)
        for start in range(0, drawn, GRID_NORMALS_TOGETHER):
            part = words[start : start + GRID_NORMALS_TOGETHER]
            self._fill(memory[8 * start :], part.nbytes)
            numbers = kernels.grid_normal(part, deviation, grid).numpy()
            if numbers.ctypes.data != part.ctypes.data:
                part.view(np.float64)[:] = numbers
        return torch.from_numpy(words.view(np.float64)[:count].reshape(shape))

    def _normal_float64(self, pairs: int) -> NDArray[np.float64]:
        bits = np.frombuffer(self.random_bytes(16 * pairs), dtype=np.uint64) >> np.uint64(11)
        return box_muller(bits.astype(np.float64) * 2.0**-53)

    def _normal_float32(self, pairs: int) -> NDArray[np.float32]:
        words = self._words(2 * -(-pairs // PAIRS_TOGETHER) * PAIRS_TOGETHER)
        return kernels.for_deviates().deviates(words)

    def __repr__(self) -> str:
        return "SecretStream(<redacted>)"


class FreshStream(SecretStream):
    """Numbers of which every draw has a key of its own, from the operating system at that moment.

    No state is kept, so a copy of this process (a fork, or a virtual machine that is resumed twice from one snapshot)
    draws other numbers than its original from its first draw on, as far as the operating system does
    (docs/threat-model.md, "Copies of the enclave").
    """

    __slots__ = ()

    def __init__(self) -> None:
        """There is no key to keep."""

    def random_bytes(self, count: int) -> bytes:
        """`count` bytes, of the operating system's: for a few, a key would take longer."""
        return os.urandom(count)

    def _fill(self, memory: NDArray[np.uint8], size: int) -> None:
        SecretStream(os.urandom(KEY_BYTES))._fill(memory, size)

    def __repr__(self) -> str:
        return "FreshStream()"
