"""How the audited model is built, as an attacker may know it: by its configuration, with weights of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from obfuscatune.audit.attacks.knowledge import Architecture
from obfuscatune.enclave.sites import find_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Logits(nn.Module):
    """Token numbers (n, length) -> logits (n, length, V)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.float().eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Without a cache, without dropout."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@lru_cache(maxsize=8)
def architecture(base: PreTrainedModel, first_blocks: int) -> Architecture:
    """That of a model, and where the layers behind the first blocks have their weights in it."""
    groups = find_groups(base, first_blocks)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Logits(AutoModelForCausalLM.from_config(base.config, trust_remote_code=False))

    def place(weights: Sequence[Tensor]) -> dict[str, Tensor]:
        placed: dict[str, Any] = {}
        for group, W in zip(groups, weights, strict=True):
            for site, part in zip(group.sites, W.split(list(group.widths), dim=1), strict=True):
                placed[f"model.{site.path}.weight"] = part if isinstance(site.layer, Conv1D) else part.T
        return placed

    return Architecture(build, lambda: Logits(copy.deepcopy(base)), place)
