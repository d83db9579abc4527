"""A model of a shape that has a name, with random weights, on disk as Hugging Face lays models out.

config  ->  names and shapes, without weights  ->  one shard after the other, each drawn and written by itself
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from obfuscatune.enclave.checkpoint import weights_names
from obfuscatune.wire.errors import StorageError

SHARD_BYTES = 1_000_000_000
"""Most bytes of one file, and so of what the writer holds in memory; one tensor alone may exceed it."""
SPARE_BYTES = 1_000_000_000
"""Left free on the disk: what a full disk breaks is other people's work."""
STANDARD_DEVIATION = 0.02  # as GPT-2 is initialised
_SEED = 0

Progress = Callable[[str], None]
_Shapes = dict[str, torch.Size]


def write_random_checkpoint(config: PretrainedConfig, folder: Path, progress: Progress) -> None:
    """`config.json` and float32 safetensors of a causal language model with that configuration.

    Raises:
        StorageError: the disk has no room for it.
    """
    shards = list(_sharded(_shapes(config)))
    _check_room(folder, sum(_size(shape) for shard in shards for shape in shard.values()))
    generator = torch.Generator().manual_seed(_SEED)
    index: dict[str, str] = {}
    single, _, index_file = weights_names()
    for number, shard in enumerate(shards, start=1):
        name = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor: _draw(shape, generator) for tensor, shape in shard.items()}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
        progress(f"wrote {name}, {number} of {len(shards)}")
    if len(shards) > 1:
        (folder / index_file).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    config.save_pretrained(folder)


def _shapes(config: PretrainedConfig) -> _Shapes:
    """The parameters of the model by name; what is tied once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _sharded(shapes: _Shapes) -> Iterator[_Shapes]:
    shard: _Shapes = {}
    for name, shape in shapes.items():
        if shard and sum(map(_size, shard.values())) + _size(shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _size(shape: torch.Size) -> int:
    return shape.numel() * torch.float32.itemsize


def _draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise StorageError(
            f"{folder} has {free} bytes free, the model takes {size} and {SPARE_BYTES} are to be left: "
            "set TMPDIR to another disk, ask for fewer --layers, or give a model that is there with --model"
        )
