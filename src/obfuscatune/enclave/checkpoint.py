"""A model directory of safetensors shards, read tensor by tensor.

Only safetensors are read: they hold numbers and nothing that runs. A tensor is read when it is asked for, into
memory of its own: so memory holds what is being worked on and no more. A very large one that is to stay, an embedding
or a head, can be mapped instead: its pages are read when they are touched, and the kernel may drop them again
(docs/adr/0029).
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obfuscatune.errors import ModelFileError
from obfuscatune.protocol.tensors import bytes_of

MAPPED_FROM_BYTES = 256 << 20
"""Smallest tensor that `mapped` maps. Of smaller ones memory of their own is faster, and little is won."""
TILE_BYTES = 1 << 20
"""Most bytes of rows read at a time, unless one row is longer: they stay in the cache until they are used."""
_LENGTH_BYTES = 8
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8} | {
    "BOOL": torch.bool
}
"""Dtypes of integer buffers. A parameter in one of these is quantised."""


class _Shard:
    """An open file, closed when nothing refers to it any more. Safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def fill(self, view: memoryview, offset: int) -> None:
        """Read `view` full of the bytes from `offset` on.

        Raises:
            ModelFileError: the disk failed, or the file is shorter.
        """
        try:
            while view and (came := os.preadv(self._descriptor, [view], offset)):
                view, offset = view[came:], offset + came
        except OSError as error:
            raise ModelFileError(f"{self._path} cannot be read: {error.strerror}") from error
        if view:
            raise ModelFileError(f"{self._path} is not a whole safetensors file: it ends too early; load it anew")

    def map(self, offset: int, nbytes: int) -> mmap.mmap | None:
        """A private mapping of the file up to the end of these bytes; None where the file is shorter.

        What is written to it stays with this process. It outlives the descriptor.
        """
        try:
            if os.fstat(self._descriptor).st_size < offset + nbytes:
                return None
            return mmap.mmap(self._descriptor, offset + nbytes, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelFileError(f"{self._path} cannot be mapped: {error.strerror}") from error


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: as the header says, but for `begin`, which counts from the file's start."""

    shard: _Shard
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Checkpoint:
    """The tensors of a model directory by name. Its files stay open.

    Raises:
        ModelFileError: no safetensors, an unreadable or truncated shard, an index that does not fit.
    """

    def __init__(self, directory: Path, variant: str | None = None) -> None:
        self._entries = {
            name: entry for path in _shard_paths(directory, variant) for name, entry in _entries(path).items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._entries)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One tensor, checked and converted.

        Raises:
            ModelFileError: absent, of another shape, not of floating-point numbers, or cut off.
        """
        entry, stored = self._checked(name, shape, dtype)
        tensor = torch.empty(shape, dtype=stored)
        entry.shard.fill(bytes_of(tensor), entry.begin)
        return tensor.to(dtype)

    def mapped(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """As `read`; a tensor of `MAPPED_FROM_BYTES` or more that is stored in that dtype is mapped from its file.

        Raises:
            ModelFileError: as `read`.
        """
        entry, stored = self._checked(name, shape, dtype)
        nbytes = shape.numel() * stored.itemsize
        if stored != dtype or nbytes < MAPPED_FROM_BYTES or entry.begin % stored.itemsize:
            return self.read(name, shape, dtype)
        memory = entry.shard.map(entry.begin, nbytes)
        if memory is None:  # `read` says so
            return self.read(name, shape, dtype)
        return torch.frombuffer(memory, dtype=stored, count=shape.numel(), offset=entry.begin).view(shape)

    def read_one_of(self, name: str, shape: torch.Size, index: int) -> Tensor:
        """The matrix (a, b) at `index` of a stack (n, a, b), in the dtype that it is stored in.

        Raises:
            ModelFileError: as `read`.
        """
        entry, stored = self._checked(name, shape)
        tensor = torch.empty(shape[1:], dtype=stored)
        entry.shard.fill(bytes_of(tensor), entry.begin + index * tensor.nbytes)
        return tensor

    def like(self, name: str) -> Tensor:
        """A tensor on the meta device of the shape and dtype that one has in the files.

        Raises:
            ModelFileError: not of floating-point numbers.
        """
        entry = self._entries[name]
        return torch.empty(entry.shape, dtype=self._checked(name, torch.Size(entry.shape))[1], device="meta")

    def check(self, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        """That `read` could read it.

        Raises:
            ModelFileError: as `read`, but for a file that is cut off.
        """
        self._checked(name, shape, dtype)

    def read_into(self, name: str, target: Tensor) -> None:
        """A matrix into memory that there is, as a target of any dtype whose rows and columns may lie in any way.

        Raises:
            ModelFileError: as `read`.
        """
        entry, stored = self._checked(name, target.shape)
        if target.is_contiguous() and target.dtype == stored:
            entry.shard.fill(bytes_of(target), entry.begin)
            return
        rows, columns = target.shape
        tile = torch.empty(min(rows, max(TILE_BYTES // (columns * stored.itemsize), 1)), columns, dtype=stored)
        for start in range(0, rows, len(tile)):
            part = tile[: min(len(tile), rows - start)]
            entry.shard.fill(bytes_of(part), entry.begin + start * columns * stored.itemsize)
            target[start : start + len(part)] = part

    def _checked(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> tuple[_Entry, torch.dtype]:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelFileError(f"tensor {name!r} is missing from the model's files")
        if entry.shape != tuple(shape):
            raise ModelFileError(f"tensor {name!r} has shape {entry.shape}, the config says {tuple(shape)}")
        stored = (_FLOATS if dtype.is_floating_point else _OTHERS).get(entry.dtype)
        if stored is None:
            raise ModelFileError(f"tensor {name!r} holds {entry.dtype}; quantised weights cannot be protected")
        return entry, stored


def weights_names(variant: str | None = None) -> tuple[str, str, str]:
    """File names of a model's weights: in one file, in shards as a pattern, and the shards' index."""
    stem = f"model.{variant}" if variant else "model"
    shards = f"model.{variant}-*.safetensors" if variant else "model-*.safetensors"
    return f"{stem}.safetensors", shards, f"model.safetensors.index.{variant + '.' if variant else ''}json"


def shard_names(directory: Path, variant: str | None = None) -> list[str]:
    """The files that hold a model's weights; none where it has neither a single file nor an index.

    Raises:
        ModelFileError: the index cannot be read, or names what is no file beside it.
    """
    single, _, index_name = weights_names(variant)
    index = directory / index_name
    if (directory / single).is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{index} is not a safetensors index: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFileError(f"{index} names the shard {name!r}, which is not a file beside it")
    return sorted(names)


def _shard_paths(directory: Path, variant: str | None) -> list[Path]:
    names = shard_names(directory, variant)
    if not names:
        single, _, index = weights_names(variant)
        raise ModelFileError(
            f"{directory} holds neither {single} nor {index}; convert the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return [directory / name for name in names]


def _entries(path: Path) -> dict[str, _Entry]:
    """What a shard holds, by name. The safetensors library judges whether the file is whole and its header sound."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            shard = _Shard(path)
        length = bytearray(_LENGTH_BYTES)
        shard.fill(memoryview(length), 0)
        header = bytearray(int.from_bytes(length, "little"))
        shard.fill(memoryview(header), _LENGTH_BYTES)
        start = _LENGTH_BYTES + len(header)
        return {
            name: _Entry(shard, said["dtype"], tuple(said["shape"]), start + said["data_offsets"][0])
            for name, said in json.loads(header).items()
            if name != "__metadata__"
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file: {error}") from error
