"""What protecting a model would mean, counted from its shape alone: what runs where, and what crosses.

    path, config or hub id  ->  model without weights  ->  Plan: a LayerPlan for each group, and what stays by kind

Nothing is read but the configuration, so a model of any size takes seconds and no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from obfuscatune.enclave.config import read_config
from obfuscatune.enclave.load import find_config
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.sites import SiteGroup, find_groups
from obfuscatune.wire.errors import ModelFileError

Place = Literal["enclave", "worker"]
Kind = Literal["embeddings", "norms", "biases", "head", "first_blocks", "other"]
KINDS: tuple[Kind, ...] = ("embeddings", "norms", "biases", "head", "first_blocks", "other")


@dataclass(frozen=True)
class LayerPlan:
    """One group of layers that multiply the same input: W (p, q).

    Attributes:
        block: index of its block; `stem` is the list that the block is in, `leaf` the name inside the block.
        place: where W lies and is multiplied by.
        trained_before: whether anything that LoRA trains comes before it, so that its input needs a gradient.
        element_bytes: bytes of one number on the wire.
    """

    stem: str
    block: int
    leaf: str
    place: Place
    p: int
    q: int
    trained_before: bool
    element_bytes: int

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        return f"{self.stem}.{self.block}.{self.leaf}"

    @property
    def parameters(self) -> int:
        """Elements of W; a bias is counted with what stays."""
        return self.p * self.q

    @property
    def forward_crossings(self) -> int:
        """Crossings of one forward pass, however many tokens it has."""
        return int(self.place == "worker")

    @property
    def backward_crossings(self) -> int:
        """Crossings of one backward pass of LoRA.

        Where attention and MLP read one input side by side (GPT-NeoX, Phi), the first MLP needs none either, and
        this counts one too many for the model.
        """
        return int(self.place == "worker" and self.trained_before)

    @property
    def forward_bytes(self) -> int:
        """Bytes per token: x* (p) to the worker, y* (q) back. Without shield rows and headers."""
        return self.forward_crossings * (self.p + self.q) * self.element_bytes

    @property
    def backward_bytes(self) -> int:
        """Bytes per token: g* (q) to the worker, d* (p) back. Without shield rows and headers."""
        return self.backward_crossings * (self.p + self.q) * self.element_bytes


@dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of the same layers: `columns` holds, layer by layer, that layer of every block."""

    stem: str
    first: int
    last: int
    columns: tuple[tuple[LayerPlan, ...], ...]


@dataclass(frozen=True)
class Unmoved:
    """Matrices inside blocks that no linear layer holds, so that they stay: `count` parameters of one shape."""

    name: str
    shape: tuple[int, ...]
    count: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """A whole model. Parameters that are tied are counted once, wherever they are used.

    Attributes:
        model: the model's class.
        layers: in the model's order.
        enclave: parameters in the enclave by kind.
        unmoved: what `enclave["other"]` holds of matrices inside blocks.
    """

    model: str
    profile: Profile
    dtype: torch.dtype
    layers: tuple[LayerPlan, ...]
    enclave: dict[Kind, int]
    unmoved: tuple[Unmoved, ...]

    @property
    def enclave_parameters(self) -> int:
        """Parameters that never leave."""
        return sum(self.enclave.values())

    @property
    def worker_parameters(self) -> int:
        """Parameters that lie, transformed, on the worker."""
        return sum(layer.parameters for layer in self.layers if layer.place == "worker")

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.enclave_parameters + self.worker_parameters

    @property
    def enclave_share(self) -> float:
        """Share of the parameters that stay in the enclave."""
        return self.enclave_parameters / self.parameters

    @property
    def forward_crossings(self) -> int:
        """Of one forward pass; a generated token takes one pass."""
        return sum(layer.forward_crossings for layer in self.layers)

    @property
    def backward_crossings(self) -> int:
        """Of one backward pass."""
        return sum(layer.backward_crossings for layer in self.layers)

    @property
    def forward_bytes(self) -> int:
        """Bytes per token of a forward pass, both ways; without shield rows and headers."""
        return sum(layer.forward_bytes for layer in self.layers)

    @property
    def backward_bytes(self) -> int:
        """Bytes per token of a backward pass, both ways; without shield rows and headers."""
        return sum(layer.backward_bytes for layer in self.layers)

    @property
    def upload_bytes(self) -> int:
        """Bytes of all matrices that are sent once."""
        return self.worker_parameters * self.dtype.itemsize

    @property
    def shield_rows(self) -> int:
        """Random rows that each crossing carries besides its tokens, at least: each as large as one token."""
        return self.profile.shield_rows if self.profile.mixing else 0

    def runs(self) -> Iterator[BlockRun]:
        """The layers by block, consecutive blocks that are alike taken together."""
        blocks = [tuple(own) for _, own in groupby(self.layers, key=lambda layer: (layer.stem, layer.block))]
        for _, alike in groupby(blocks, key=lambda own: [(it.stem, it.leaf, it.place, it.p, it.q) for it in own]):
            same = list(alike)
            first, last = same[0][0], same[-1][0]
            yield BlockRun(first.stem, first.block, last.block, tuple(zip(*same, strict=True)))


def model_from_config(model: str | Path) -> PreTrainedModel:
    """The model that a configuration describes, without weights.

    Args:
        model: a `config.json`, a directory that holds one, or a hub id (of which nothing else is fetched).

    Raises:
        ModelFileError: no configuration there, or one of no transformer that we can build.
    """
    config = read_config(find_config(model))
    for auto_class in (AutoModelForCausalLM, AutoModel):
        try:
            with torch.device("meta"):  # even what a layer allocates before it becomes a parameter: experts are large
                skeleton: PreTrainedModel = auto_class.from_config(config, trust_remote_code=False)
        except ValueError as error:  # not a causal language model: perhaps an encoder
            reason = error
            continue
        skeleton.tie_weights()  # building without weights leaves ties undone, and what is tied counts once
        return skeleton
    raise ModelFileError(f"no model can be built from the configuration of {str(model)!r}: {reason}") from reason


def make_plan(model: nn.Module, profile: Profile, dtype: torch.dtype = torch.float32) -> Plan:
    """Count what `protect` would do to a model; it is not changed and may be without weights.

    Args:
        model: plain, with no adapter on it.
        profile: resolved.
        dtype: in which parameters are kept and rows travel.

    Raises:
        ProtectionError: there would be nothing to protect.
    """
    moved = {group.name for group in find_groups(model, profile.first_blocks)} if profile.offload else set()
    groups = find_groups(model, 0)
    layers = tuple(
        _plan_layer(group, "worker" if group.name in moved else "enclave", group is not groups[0], dtype.itemsize)
        for group in groups
    )
    enclave, unmoved = _what_stays(model, groups, moved)
    return Plan(type(model).__name__, profile, dtype, layers, enclave, unmoved)


def _plan_layer(group: SiteGroup, place: Place, trained_before: bool, element_bytes: int) -> LayerPlan:
    stem, _, leaf = group.name.partition(f".{group.block}.")
    return LayerPlan(
        stem, group.block, leaf, place, group.in_features, sum(group.widths), trained_before, element_bytes
    )


def _what_stays(
    model: nn.Module, groups: list[SiteGroup], moved: set[str]
) -> tuple[dict[Kind, int], tuple[Unmoved, ...]]:
    """Parameters that stay, by kind; and the matrices in blocks that stay for want of a linear layer."""
    in_enclave = {site.path: group.name not in moved for group in groups for site in group.sites}
    stems = tuple({f"{_stem(group)}." for group in groups})
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    left: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for name, parameter in model.named_parameters():  # each once, though it be tied to others
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in in_enclave:
            counts["first_blocks"] += parameter.numel() if in_enclave[path] else 0
            continue
        in_block = name.startswith(stems)
        kind = _kind(model.get_submodule(path), leaf, in_block)
        counts[kind] += parameter.numel()
        if kind == "other" and in_block and parameter.dim() > 1:
            left[_without_index(name), tuple(parameter.shape)] += 1
    unmoved = tuple(
        Unmoved(name, shape, count, count * torch.Size(shape).numel()) for (name, shape), count in left.items()
    )
    return counts, unmoved


def _kind(owner: nn.Module, leaf: str, in_block: bool) -> Kind:
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if leaf == "bias":
        return "biases"
    if not in_block and isinstance(owner, nn.Linear):
        return "head"
    return "other"


def _stem(group: SiteGroup) -> str:
    return group.name.partition(f".{group.block}.")[0]


def _without_index(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
