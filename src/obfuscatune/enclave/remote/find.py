"""Which layers of a PEFT model have an adapter that can be moved to the worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from obfuscatune.enclave.modules import ProtectedConv1D, ProtectedLinear, SharedCrossing
from obfuscatune.wire.errors import ProtectionError


@dataclass(frozen=True)
class AdaptedLayer:
    """A protected layer that PEFT wrapped, and its one adapter: y = x W + s · drop(x) A B."""

    layer: Any
    """PEFT's `lora.Linear`."""
    name: str
    """Of the adapter."""
    slot: int
    """Which of the crossing's layers it is."""

    @property
    def lora_a(self) -> nn.Parameter:
        """PEFT's parameter (r, p), the transpose of A."""
        weight: nn.Parameter = self.layer.lora_A[self.name].weight
        return weight

    @property
    def lora_b(self) -> nn.Parameter:
        """PEFT's parameter (q, r), the transpose of B."""
        weight: nn.Parameter = self.layer.lora_B[self.name].weight
        return weight

    @property
    def rank(self) -> int:
        """r."""
        return int(self.lora_a.shape[0])

    @property
    def scale(self) -> float:
        """s."""
        return float(self.layer.scaling[self.name])

    @property
    def dropout(self) -> float:
        """Share of x that is dropped in training."""
        return float(getattr(self.layer.lora_dropout[self.name], "p", 0.0))

    @property
    def is_active(self) -> bool:
        """Whether PEFT would add this adapter's part now.

        Raises:
            ProtectionError: it would add another adapter's.
        """
        if self.layer.disable_adapters:
            return False
        others = [name for name in self.layer.active_adapters if name != self.name and name in self.layer.lora_A]
        if others:
            raise ProtectionError(f"adapter {others[0]!r} is active, and {self.name!r} is the one that the worker has")
        return self.name in self.layer.active_adapters


def find_adapted(model: nn.Module) -> dict[SharedCrossing, list[AdaptedLayer]]:
    """The adapted layers of each crossing, by slot.

    Raises:
        ProtectionError: no adapter, or one that the worker cannot hold.
    """
    found: dict[SharedCrossing, list[AdaptedLayer]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapted = _adapted(path, module)
        if adapted is not None:
            found.setdefault(module.base_layer._crossing, []).append(adapted)
    if not found:
        raise ProtectionError("no protected layer of this model has a LoRA adapter: wrap it with peft.get_peft_model")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ProtectionError(
            "gradient checkpointing computes a block twice, and the worker would draw another dropout: "
            "switch it off, or use lora_on='enclave'"
        )
    return {crossing: sorted(layers, key=lambda it: it.slot) for crossing, layers in found.items()}


def _adapted(path: str, module: Any) -> AdaptedLayer | None:
    base = module.base_layer
    if not isinstance(base, ProtectedLinear | ProtectedConv1D):
        return None
    names = list(module.lora_A)
    if len(names) != 1 or type(module) is not lora.Linear:
        raise ProtectionError(f"{path} has the adapters {names}: one LoRA adapter for a linear layer can be moved")
    (name,) = names
    if module.lora_variant or module.lora_bias[name] or module.merged:
        raise ProtectionError(f"{path} has a variant of LoRA, a bias or a merged adapter: plain LoRA can be moved")
    return AdaptedLayer(module, name, base._slot)


def walk(found: dict[SharedCrossing, list[AdaptedLayer]]) -> Iterator[AdaptedLayer]:
    """All of them."""
    for layers in found.values():
        yield from layers
