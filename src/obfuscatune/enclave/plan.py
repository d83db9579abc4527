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

from obfuscatune.enclave.checkpoint import Checkpoint, shard_names
from obfuscatune.enclave.config import empty_model, read_config
from obfuscatune.enclave.loading import find_config
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.target_layers import (
    Expert,
    Kept,
    LayerGroup,
    find_groups,
    find_kept,
    find_target_layers,
    group_layers,
)
from obfuscatune.enclave.weights import StoredWeights

Place = Literal["enclave", "worker"]
Kind = Literal["embeddings", "norms", "biases", "head", "first_blocks", "other"]
KINDS: tuple[Kind, ...] = ("embeddings", "norms", "biases", "head", "first_blocks", "other")


@dataclass(frozen=True)
class LayerPlan:
    """One group of layers that multiply the same input: W (p, q); or a stack of experts, each of that shape.

    Attributes:
        count: matrices of that shape: experts, or 1.
        active: how many of these a token goes through.
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
    count: int = 1
    active: int = 1

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        return f"{self.stem}.{self.block}.{self.leaf}"

    @property
    def parameters(self) -> int:
        """Elements of W, or of all experts' W; a bias is counted with what stays."""
        return self.count * self.p * self.q

    @property
    def forward_crossings(self) -> int:
        """Crossings of one forward pass, however many tokens it has; of experts, when all are hit."""
        return self.count if self.place == "worker" else 0

    @property
    def backward_crossings(self) -> int:
        """Crossings of one backward pass of LoRA.

        Where attention and MLP read one input side by side (GPT-NeoX, Phi), the first MLP needs none either, and
        this counts one too many for the model.
        """
        return self.forward_crossings if self.trained_before else 0

    @property
    def forward_bytes(self) -> int:
        """Bytes per token: x* (p) to the worker, y* (q) back. Without shield rows and headers."""
        return bool(self.forward_crossings) * self.active * (self.p + self.q) * self.element_bytes

    @property
    def backward_bytes(self) -> int:
        """Bytes per token: g* (q) to the worker, d* (p) back. Without shield rows and headers."""
        return bool(self.backward_crossings) * self.active * (self.p + self.q) * self.element_bytes


@dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of the same layers: `columns` holds, layer by layer, that layer of every block."""

    stem: str
    first: int
    last: int
    columns: tuple[tuple[LayerPlan, ...], ...]


@dataclass(frozen=True)
class Unmoved:
    """Matrices inside blocks that cannot go to a worker, and why: `count` parameters of one shape."""

    name: str
    shape: tuple[int, ...]
    reason: str
    count: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """A whole model. Parameters that are tied are counted once, wherever they are used.

    Attributes:
        model: the model's class.
        auto_class: the class of transformers that `load` is to be given for it, "AutoModelForCausalLM" by default.
        layers: in the model's order.
        enclave: parameters in the enclave by kind.
        unmoved: what `enclave["other"]` holds of matrices inside blocks.
    """

    model: str
    auto_class: str
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
        """Parameters of the whole model."""
        return self.enclave_parameters + self.worker_parameters

    @property
    def enclave_share(self) -> float:
        """Share of the parameters that stay in the enclave."""
        return self.enclave_parameters / self.parameters

    @property
    def forward_crossings(self) -> int:
        """Crossings of one forward pass, and so of one generated token."""
        return sum(layer.forward_crossings for layer in self.layers)

    @property
    def backward_crossings(self) -> int:
        """Crossings of one backward pass."""
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
    """The model that a configuration describes, without weights; built as `load` builds it, and refused as there.

    Args:
        model: a `config.json`, a directory that holds one, or a hub id (of which nothing else is fetched). Where the
            directory holds weights, these are looked through by name, shape and dtype.

    Raises:
        ModelFileError: no configuration there, or one of no transformer that we can build; or weights that do not fit.
    """
    path = find_config(model)
    config = read_config(path)
    auto_class = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    skeleton = empty_model(config, auto_class, None)
    if path.is_dir() and shard_names(path):
        StoredWeights(Checkpoint(path), skeleton)
    return skeleton


def make_plan(model: nn.Module, profile: Profile, dtype: torch.dtype = torch.float32) -> Plan:
    """Count what `protect` would do to a model; it is not changed and may be without weights.

    Args:
        model: plain, with no adapter on it.
        profile: resolved.
        dtype: in which parameters are kept and rows travel.

    Raises:
        ProtectionError: there would be nothing to protect.
    """
    found = list(find_target_layers(model))
    moved = {group.name for group in find_groups(model, profile.first_blocks)} if profile.offload else set()
    groups = group_layers(found)
    if not groups:
        find_groups(model, 0)  # says what was expected
    layers = tuple(_plan_layers(model, groups, moved, dtype.itemsize))
    enclave = _what_stays(model, groups, moved)
    kind = "AutoModelForCausalLM" if is_causal(model) else "AutoModel"
    return Plan(type(model).__name__, kind, profile, dtype, layers, enclave, tuple(_unmoved(find_kept(model, found))))


def is_causal(model: nn.Module) -> bool:
    """Whether it is what `AutoModelForCausalLM` makes of its configuration."""
    config = getattr(model, "config", None)
    return type(config) in AutoModelForCausalLM._model_mapping


def _plan_layers(
    model: nn.Module, groups: list[LayerGroup], moved: set[str], element_bytes: int
) -> Iterator[LayerPlan]:
    """One for each group; experts of one stack are one."""
    for (first, _), alike in groupby(groups, key=lambda group: (group.targets[0].parameter, group.widths)):
        same = list(alike)
        group, is_expert = same[0], isinstance(same[0].targets[0].layer, Expert)
        name = first if is_expert else group.name
        stem, _, leaf = name.partition(f".{group.block}.")
        place: Place = "worker" if group.name in moved else "enclave"
        active = min(_experts_per_token(model), len(same)) if is_expert else 1
        p, q = group.shape
        yield LayerPlan(stem, group.block, leaf, place, p, q, group is not groups[0], element_bytes, len(same), active)


def _experts_per_token(model: nn.Module) -> int:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return int(next((value for name in names if isinstance(value := getattr(config, name, None), int)), 1))


def _what_stays(model: nn.Module, groups: list[LayerGroup], moved: set[str]) -> dict[Kind, int]:
    """Parameters that stay, by kind."""
    in_enclave = {target.parameter: group.name not in moved for group in groups for target in group.targets}
    stems = tuple({f"{_stem(group)}." for group in groups})
    counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():  # each once, though it be tied to others
        path, _, leaf = name.rpartition(".")
        if name in in_enclave:
            counts["first_blocks"] += parameter.numel() if in_enclave[name] else 0
        else:
            counts[_kind(model.get_submodule(path), leaf, name.startswith(stems))] += parameter.numel()
    return counts


def _unmoved(kept: list[Kept]) -> Iterator[Unmoved]:
    """Those of one name but for the block's index, and of one shape, together."""
    alike = Counter((_without_index(it.name), it.shape, it.reason) for it in kept)
    for (name, shape, reason), count in alike.items():
        yield Unmoved(name, tuple(shape), reason, count, count * shape.numel())


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


def _stem(group: LayerGroup) -> str:
    return group.name.partition(f".{group.block}.")[0]


def _without_index(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
