"""Which layers of a model go to the worker, which of them share an input, and what their role is.

A layer goes if it is a linear layer inside one of the model's blocks: the children of the outermost `ModuleList` on its
path. So does each matrix of a stack of experts. Embeddings, norms, biases, head and adapters stay in the enclave, and
whatever else a block has of matrices: where that is much, the model is refused by name.

The paper's scheme rotates one side of a layer, by its role:

    reads     q, k, v; gate, up, fc1     X* = X R_a, W* = R_a⁻¹ W       outputs plain outside
    writes    attention output, fc2      W* = W R_b                     inputs plain outside, O = O* R_b⁻¹

Hugging Face's names tell the role. A name that is not known here goes by its shape: from the model's width to another
it reads, from another to that width it writes. Where neither tells, nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.weight_reads import find_weight_reads
from obfuscatune.errors import ProtectionError

ResidualRole = Literal["reads", "writes"]

_LEAF = r"(?:^|\.)(?:{})$"
READS = re.compile(
    _LEAF.format(
        r"[qkv]_proj|query|key|value|[qkv]_lin|query_key_value|qkv_proj|Wqkv|c_attn|q_attn|qkv|in_proj"
        r"|gate_proj|up_proj|gate_up_proj|c_fc|fc1|fc_in|lin1|w1|w3|Wi|dense_h_to_4h|intermediate\.dense"
    )
)
WRITES = re.compile(
    _LEAF.format(
        r"o_proj|out_proj|out_lin|Wo|down_proj|c_proj|fc2|fc_out|lin2|w2|dense_4h_to_h"
        r"|output\.dense|self_attn\.dense|attention\.dense|self_attention\.dense"
    )
)


def residual_role(name: str, p: int, q: int, width: int | None) -> ResidualRole:
    """Whether a layer W (p, q) reads the residual stream or writes to it.

    Args:
        name: dotted path of the layer, or of the first of a group.
        p, q: of the layer, or of the group's first.
        width: of the residual stream, where the configuration tells.

    Raises:
        ProtectionError: neither name nor shape tell.
    """
    if READS.search(name):
        return "reads"
    if WRITES.search(name):
        return "writes"
    if width is not None and (p == width) != (q == width):
        return "reads" if p == width else "writes"
    raise ProtectionError(
        f"{name} ({p} x {q}): neither its name nor its shape tells whether it reads the residual stream or writes to "
        "it, which sides='paper' goes by; add its name to enclave/target_layers.py, or use profile 'private'"
    )


# Siblings of one parent that multiply the same input, in Hugging Face's names. Should a model call them
# with different inputs after all, the result is still right and only a crossing is wasted.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, Phi, OPT
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("gate_proj", "up_proj"),  # SwiGLU MLPs
)
LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
"""Subclasses of `nn.Linear` that compute y = x W + b, only rounded otherwise in 16 bit."""
MOST_KEPT = 0.1
"""Share of the blocks' matrices that may stay in the enclave for want of a linear layer that can go."""


@dataclass(frozen=True)
class Expert:
    """One matrix of a stack (n, a, b) that a module of experts, as transformers 5 has them, keeps as one parameter."""

    experts: nn.Module
    parameter: str
    index: int

    @property
    def stack(self) -> Tensor:
        """(n, a, b)."""
        stack: Tensor = getattr(self.experts, self.parameter)
        return stack

    def oriented(self, matrix: Tensor) -> Tensor:
        """One matrix (a, b) of the stack as W (p, q): y = x W."""
        return matrix if self.experts.is_transposed else matrix.T


@dataclass(frozen=True)
class TargetLayer:
    """One linear layer, or one expert's matrix, inside a block.

    Attributes:
        name: dotted path of the layer, without PEFT's `base_layer`: `model.layers.0.mlp.up_proj`;
            of an expert `model.layers.0.mlp.experts.down_proj.3`.
        path: dotted path of the module itself.
        layer: the `nn.Linear` or `Conv1D`, or which matrix of the module.
        block: index of the block that it is in.
    """

    name: str
    path: str
    layer: nn.Linear | Conv1D | Expert
    block: int

    @property
    def weight(self) -> Tensor:
        """W (p, q): y = x W; a view of the layer's parameter."""
        if isinstance(self.layer, Expert):
            return self.layer.oriented(self.layer.stack[self.layer.index])
        return self.layer.weight if isinstance(self.layer, Conv1D) else self.layer.weight.T

    @property
    def parameter(self) -> str:
        """Dotted path of the parameter that W is, or is in."""
        return f"{self.path}.{self.layer.parameter if isinstance(self.layer, Expert) else 'weight'}"

    @property
    def in_features(self) -> int:
        """p of W (p, q)."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """q of W (p, q)."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class Kept:
    """A matrix, or a stack of them, that stays in the enclave although it is in a block, and why."""

    name: str
    shape: torch.Size
    reason: str

    @property
    def parameters(self) -> int:
        """Elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class LayerGroup:
    """Target layers that multiply the same input and cross as one: W (p, q_1 + q_2 + ...)."""

    targets: tuple[TargetLayer, ...]

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        first, *others = (target.name for target in self.targets)
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def block(self) -> int:
        """Index of the block."""
        return self.targets[0].block

    @property
    def in_features(self) -> int:
        """p."""
        return self.targets[0].in_features

    @property
    def widths(self) -> tuple[int, ...]:
        """q_1, q_2, ..."""
        return tuple(target.out_features for target in self.targets)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of W."""
        return self.in_features, sum(self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W, which all target layers share."""
        return self.targets[0].weight.dtype

    def joint_weight(self) -> Tensor:
        """W (p, q), on the CPU and contiguous: the layers' weights side by side; memory of its own."""
        W = torch.empty(self.shape, dtype=self.dtype)
        for target, own in zip(self.targets, W.split(list(self.widths), dim=1), strict=True):
            own.copy_(target.weight)
        return W

    @property
    def weight_bytes(self) -> int:
        """Size of W in bytes."""
        p, q = self.shape
        return p * q * self.dtype.itemsize


def find_groups(model: nn.Module, first_blocks: int) -> list[LayerGroup]:
    """All groups beyond the first `first_blocks` blocks, in the model's order.

    Raises:
        ProtectionError: nothing is found to protect, or much would stay in the enclave that protection is meant for.
    """
    found = list(find_target_layers(model))
    targets = [target for target in found if target.block >= first_blocks]
    refuse_what_stays(found, find_kept(model, found))
    if not targets:
        raise ProtectionError(
            f"no linear layers to offload in {type(model).__name__} beyond the first {first_blocks} blocks; "
            "expected a transformer whose blocks are a ModuleList of Linear or Conv1D layers"
        )
    return group_layers(targets)


def group_layers(targets: list[TargetLayer]) -> list[LayerGroup]:
    """Target layers that multiply the same input together, in the order of each group's first."""
    by_name = {target.name: target for target in targets}
    groups: list[LayerGroup] = []
    taken: set[str] = set()
    for target in targets:
        if target.name not in taken:
            members = tuple(by_name[name] for name in _siblings(target.name) if name in by_name)
            members = tuple(member for member in members if member.in_features == target.in_features)
            taken |= {member.name for member in members}
            groups.append(LayerGroup(members))
    return groups


def find_target_layers(model: nn.Module) -> Iterator[TargetLayer]:
    """Every linear layer and every expert inside a block, in the model's order; what PEFT added is left out.

    Raises:
        ProtectionError: an adapter that cannot do without the weights.
    """
    read = find_weight_reads(model)
    for path, module in _without_adapters(model):
        block, name = _block_index(model, path), path.replace(".base_layer", "")
        if block is None or name in read:
            continue
        if is_linear(module):
            yield TargetLayer(name, path, module, block)
        for parameter in experts_matrices(module):
            for index in range(len(getattr(module, parameter))):
                yield TargetLayer(f"{name}.{parameter}.{index}", path, Expert(module, parameter, index), block)


def find_kept(model: nn.Module, targets: list[TargetLayer]) -> list[Kept]:
    """The matrices inside blocks that are none of the `targets`; norms and embeddings are not counted."""
    moved, read = {target.parameter for target in targets}, find_weight_reads(model)
    kept = []
    for path, module in _without_adapters(model):
        if isinstance(module, nn.Embedding) or _block_index(model, path) is None:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name, kind = f"{path}.{leaf}", type(module).__name__
            if parameter.dim() > 1 and name not in moved:
                reason = f"a {kind} computes in its own way"
                if (plain := path.replace(".base_layer", "")) in read:
                    reason = f"the code of {read[plain]} reads the weight of this {kind} itself"
                kept.append(Kept(name, parameter.shape, reason))
    return kept


def refuse_what_stays(targets: list[TargetLayer], kept: list[Kept]) -> None:
    """Refuse a model of whose blocks much would stay in the enclave.

    Raises:
        ProtectionError: names the largest matrix that would, and the reason.
    """
    staying = sum(it.parameters for it in kept)
    moving = sum(target.in_features * target.out_features for target in targets)
    if kept and staying > MOST_KEPT * (staying + moving):
        largest = max(kept, key=lambda it: it.parameters)
        raise ProtectionError(
            f"{largest.name} {tuple(largest.shape)} cannot go to a worker: {largest.reason}; with what else is of this "
            f"kind, {staying / (staying + moving):.0%} of the blocks' matrices would stay in the enclave, and at most "
            f"{MOST_KEPT:.0%} may: use profile 'enclave', or another architecture"
        )


def refuse_absent_weights(model: nn.Module, groups: list[LayerGroup]) -> None:
    """Refuse a model in memory whose weights are not all there.

    Raises:
        ProtectionError: a parameter is on the meta device, as accelerate leaves what it offloads, or a layer is called
            through a hook of accelerate's.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ProtectionError(
                f"the values of {name} are not in memory: it is on the meta device, where accelerate keeps what it has "
                "offloaded; load the model without device_map, cpu_offload or disk_offload, or use obfuscatune.load"
            )
    for target in (target for group in groups for target in group.targets):
        if not isinstance(target.layer, Expert) and hasattr(target.layer, "_hf_hook"):
            raise ProtectionError(
                f"{target.name} is called through a hook of accelerate's, which moves its input and weights: load the "
                "model without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes y = x W + b from a parameter `weight`, and nothing else."""
    kind = type(module)
    return kind in (nn.Linear, Conv1D) or f"{kind.__module__}.{kind.__qualname__}" in LINEAR


def experts_matrices(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacks (n, a, b) of a module of experts, first that which reads; empty for another module.

    Experts are what transformers' `use_experts_implementation` has marked: its flags say how they compute.
    """
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    stacks = [module._parameters.get(name) for name in names]
    return names if all(stack is not None and stack.dim() == 3 for stack in stacks) else ()


def _without_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by path, but for what PEFT added.

    Raises:
        ProtectionError: an adapter that cannot do without the weights.
    """
    adapters: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in adapters):
            continue
        if isinstance(module, BaseTunerLayer):
            if getattr(module, "lora_magnitude_vector", None):
                raise ProtectionError(f"{path} has DoRA, which needs the weights at every step; use LoRA or rsLoRA")
            adapters += [f"{path}.{name}." for name, _ in module.named_children() if name != "base_layer"]
            adapters += [f"{path}.{name}" for name, _ in module.named_children() if name != "base_layer"]
        elif isinstance(module, ModulesToSaveWrapper):
            adapters.append(f"{path}.")
        else:
            yield path, module


def _block_index(model: nn.Module, path: str) -> int | None:
    """Position in the outermost ModuleList on the path; None where there is none."""
    module = model
    for name in path.split(".") if path else ():
        if isinstance(module, nn.ModuleList):
            return int(name)
        module = getattr(module, name)
    return None


def _siblings(name: str) -> tuple[str, ...]:
    parent, _, leaf = name.rpartition(".")
    for family in SHARED_INPUT:
        if leaf in family:
            return tuple(f"{parent}.{member}" for member in family)
    return (name,)
