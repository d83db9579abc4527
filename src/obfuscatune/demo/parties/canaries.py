"""A search for what must not leave the enclave, in everything that did.

A canary is a run of bytes: a piece of the owner's text as it would be written, encoded or tokenized, or neighbouring
weights of a matrix in each dtype that they could have, along rows and along columns. What is found is never chance:
no canary has fewer than fifteen bytes.

Not found is what is compressed, encrypted or transformed: the first of these nothing here does.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LEAST_BYTES = 15
"""Of a canary."""
_WORD_BYTES = 8
_HASH_BITS = 20
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio (Knuth, The Art of Computer Programming, 6.4)."""
_NUMBER_BYTES = 16
_CHUNK_BYTES = 8 * 2**20
_PLACES = 6
"""In a tensor, spread over all of it, along each direction."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ID_TYPES = (("<i8", 3), ("<i4", 4), ("<u2", 8))


@dataclass(frozen=True)
class Canary:
    """Bytes to search for, and what they are of."""

    kind: str
    """Of which secret: the data, an adapter, the base model."""
    what: str
    pattern: bytes


@dataclass(frozen=True)
class Found:
    """A canary, and where it was."""

    where: str
    kind: str
    what: str


def of_text(kind: str, texts: Iterable[str]) -> Iterator[Canary]:
    """Pieces of text as UTF-8, UTF-16, hex and base64."""
    for text in texts:
        data = text.encode()
        yield Canary(kind, "UTF-8", data)
        yield Canary(kind, "UTF-16", text.encode("utf-16-le"))
        yield Canary(kind, "hex", data.hex().encode())
        for skipped in range(3):  # where the text begins within the groups of three bytes
            inner = data[skipped:]
            yield Canary(kind, "base64", base64.b64encode(inner[: len(inner) // 3 * 3]))


def of_tokens(kind: str, sequences: Iterable[Sequence[int]]) -> Iterator[Canary]:
    """Every run of a few token ids, in each integer type that libraries keep them in."""
    for ids in sequences:
        for name, count in _ID_TYPES:
            for start in range(len(ids) - count + 1):
                run = np.asarray(ids[start : start + count], dtype=name)
                if len(set(run.tolist())) > 2:
                    yield Canary(kind, f"token ids {name[1:]}", run.tobytes())


def of_tensors(kind: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[Canary]:
    """Runs of neighbouring weights of each tensor, along rows and columns, in each dtype."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() < _NUMBER_BYTES:
            continue
        ways = {"rows": tensor.reshape(-1)}
        if tensor.dim() == 2:
            ways["columns"] = tensor.T.reshape(-1)
        for way, flat in ways.items():
            for dtype in _DTYPES:
                count = _NUMBER_BYTES // dtype.itemsize
                for start in np.linspace(0, len(flat) - count, _PLACES, dtype=int):
                    run = flat[start : start + count].to(dtype).contiguous()
                    pattern = run.view(torch.uint8).numpy().tobytes()
                    if len(set(run.tolist())) == count and len(set(pattern[:_WORD_BYTES])) > 2:
                        yield Canary(kind, f"{name}, {way}, {str(dtype).removeprefix('torch.')}", pattern)


class Search:
    """Looks for all canaries at once, at every byte.

    Wherever a canary of fifteen bytes or more lies, one of the words of eight bytes that the data consists of lies
    within it. So the data is read word by word, and each word is looked up among those that begin at the first eight
    bytes of each canary.
    """

    def __init__(self, canaries: Iterable[Canary]) -> None:
        by_pattern = {it.pattern: it for it in canaries}
        self.kinds: dict[str, int] = {}
        """Canaries by kind."""
        self._by_word: dict[int, list[tuple[Canary, int]]] = {}
        for pattern, canary in by_pattern.items():
            if len(pattern) < LEAST_BYTES:
                raise ValueError(f"a canary of {len(pattern)} bytes; it takes {LEAST_BYTES} to be found everywhere")
            self.kinds[canary.kind] = self.kinds.get(canary.kind, 0) + 1
            for shift in range(_WORD_BYTES):
                word = int.from_bytes(pattern[shift : shift + _WORD_BYTES], "little")
                self._by_word.setdefault(word, []).append((canary, shift))
        self._longest = max(map(len, by_pattern), default=LEAST_BYTES)
        self._words = np.array(sorted(self._by_word), dtype="<u8")
        self._likely = np.zeros(2**_HASH_BITS, dtype=bool)
        self._likely[_hashed(self._words)] = True
        self.searched = 0
        """Bytes that were looked through."""

    def in_bytes(self, data: bytes) -> set[Canary]:
        """The canaries that are in these bytes."""
        found: set[Canary] = set()
        words = np.frombuffer(data, "<u8", len(data) // _WORD_BYTES)
        likely = np.flatnonzero(self._likely[_hashed(words)])
        at = np.searchsorted(self._words, words[likely])
        known = self._words[np.minimum(at, len(self._words) - 1)] == words[likely] if len(self._words) else at < 0
        for index in likely[known].tolist():
            for canary, shift in self._by_word[int(words[index])]:
                start = _WORD_BYTES * index - shift
                if start >= 0 and canary not in found and data.startswith(canary.pattern, start):
                    found.add(canary)
        return found

    def in_file(self, path: Path, where: str) -> list[Found]:
        """The canaries in a file, and in its name."""
        found = self.in_bytes(str(path).encode())
        with path.open("rb") as file:
            kept = b""
            while chunk := file.read(_CHUNK_BYTES):
                self.searched += len(chunk)
                data = kept + chunk
                found |= self.in_bytes(data)
                kept = data[-(self._longest - 1) :]
        return [Found(where, canary.kind, canary.what) for canary in sorted(found, key=lambda it: (it.kind, it.what))]

    def below(self, folder: Path) -> list[Found]:
        """The canaries in all files below a folder. Links are not followed: what they lead to is no file of it."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
        return [found for path in files for found in self.in_file(path, str(path.relative_to(folder.parent)))]


def _hashed(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Any:
    return (words * _HASH_FACTOR) >> np.uint64(64 - _HASH_BITS)


def tensors_of(path: Path) -> Any:
    """The tensors of a safetensors file, by name."""
    from safetensors.torch import load

    return load(path.read_bytes())
