"""Which layers of a model go to the worker, and which of them share an input.

A layer goes if it is a linear layer inside one of the model's blocks: the children of the outermost
`ModuleList` on its path. Embeddings, norms, biases, head and adapters stay in the enclave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.wire.errors import ProtectionError

# Siblings of one parent that multiply the same input, in Hugging Face's names. Should a model call them
# with different inputs after all, the result is still right and only a crossing is wasted.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, Phi, OPT
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("gate_proj", "up_proj"),  # SwiGLU MLPs
)


@dataclass(frozen=True)
class Site:
    """One linear layer inside a block.

    Attributes:
        name: dotted path of the layer, without PEFT's `base_layer`: `model.layers.0.mlp.up_proj`.
        path: dotted path of the module itself.
        layer: the `nn.Linear` or `Conv1D`.
        block: index of the block that it is in.
    """

    name: str
    path: str
    layer: nn.Linear | Conv1D
    block: int

    @property
    def in_features(self) -> int:
        """p of W (p, q)."""
        return self.layer.nx if isinstance(self.layer, Conv1D) else self.layer.in_features

    @property
    def out_features(self) -> int:
        """q of W (p, q)."""
        return self.layer.nf if isinstance(self.layer, Conv1D) else self.layer.out_features


@dataclass(frozen=True)
class SiteGroup:
    """Sites that multiply the same input and cross as one: W (p, q_1 + q_2 + ...)."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        first, *others = (site.name for site in self.sites)
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def block(self) -> int:
        """Index of the block."""
        return self.sites[0].block

    @property
    def in_features(self) -> int:
        """p."""
        return self.sites[0].in_features

    @property
    def widths(self) -> tuple[int, ...]:
        """q_1, q_2, ..."""
        return tuple(site.out_features for site in self.sites)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of W."""
        return self.in_features, sum(self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """Of W, which all sites share."""
        return self.sites[0].layer.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Of W."""
        p, q = self.shape
        return p * q * self.dtype.itemsize


def find_groups(model: nn.Module, first_blocks: int) -> list[SiteGroup]:
    """All groups beyond the first `first_blocks` blocks, in the model's order.

    Raises:
        ProtectionError: nothing is found to protect.
    """
    sites = [site for site in find_sites(model) if site.block >= first_blocks]
    if not sites:
        raise ProtectionError(
            f"no linear layers to offload in {type(model).__name__} beyond the first {first_blocks} blocks; "
            "expected a transformer whose blocks are a ModuleList of Linear or Conv1D layers"
        )
    by_name = {site.name: site for site in sites}
    groups: list[SiteGroup] = []
    taken: set[str] = set()
    for site in sites:
        if site.name not in taken:
            members = tuple(by_name[name] for name in _siblings(site.name) if name in by_name)
            members = tuple(member for member in members if member.in_features == site.in_features)
            taken |= {member.name for member in members}
            groups.append(SiteGroup(members))
    return groups


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Every linear layer inside a block, in the model's order; what PEFT added is left out.

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
        elif isinstance(module, ModulesToSaveWrapper):
            adapters.append(f"{path}.")
        elif type(module) in (nn.Linear, Conv1D):
            block = _block_index(model, path)
            if block is not None:
                yield Site(path.replace(".base_layer", ""), path, module, block)


def _block_index(model: nn.Module, path: str) -> int | None:
    """Position in the outermost ModuleList on the path; None where there is none."""
    module = model
    for name in path.split("."):
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
