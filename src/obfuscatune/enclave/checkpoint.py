"""A model directory of safetensors shards, read tensor by tensor.

Only safetensors are read: they hold numbers and nothing that runs. A tensor is mapped from disk when it
is asked for, so that memory holds what is being worked on and no more.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obfuscatune.wire.errors import ModelFileError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model directory by name.

    Raises:
        ModelFileError: no safetensors, an unreadable or truncated shard, an index that does not fit.
    """

    def __init__(self, directory: Path) -> None:
        self._shards = {path: _open_shard(path) for path in _shard_paths(directory)}
        self._shard_of = {name: shard for shard in self._shards.values() for name in shard.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._shard_of)

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """One tensor, checked and converted.

        Raises:
            ModelFileError: absent, of another shape, or not of floating-point numbers.
        """
        if name not in self._shard_of:
            raise ModelFileError(f"tensor {name!r} is missing from the model's files")
        try:
            tensor: Tensor = self._shard_of[name].get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"tensor {name!r} cannot be read: {error}") from error
        if tensor.shape != shape:
            raise ModelFileError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the config says {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ModelFileError(f"tensor {name!r} holds {tensor.dtype}; quantised weights cannot be protected")
        return tensor.to(dtype)


def _shard_paths(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelFileError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; convert the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{index} is not a safetensors index: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelFileError(f"{index} names the shard {name!r}, which is not a file beside it")
    return [directory / name for name in sorted(names)]


def _open_shard(path: Path) -> safe_open:
    try:
        shard: safe_open = safe_open(path, framework="pt", device="cpu").__enter__()
        return shard
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file: {error}") from error
