"""All adapters of a model, moved to the worker; PEFT saves and loads them as if they were here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from obfuscatune.enclave.client import WorkerLink
from obfuscatune.enclave.client.adapters import zero_all
from obfuscatune.enclave.protected_model import extend
from obfuscatune.enclave.remote_lora.adapter import AdaptedLayer, RemoteAdapter, find_adapted, walk
from obfuscatune.enclave.remote_lora.layers import AdaptedCrossing
from obfuscatune.enclave.remote_lora.optimizer import RemoteOptimizer
from obfuscatune.enclave.spill_store import Offloaded

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class RemoteAdapters:
    """What `Protection.move_adapter` returns.

    PEFT's own parameters stay as the place that factors are fetched into, and are not trained here: an optimizer
    made of them would find none that wants a gradient. `state_dict`, hence `save_pretrained`, fetches first;
    `load_state_dict` puts what it read.
    """

    def __init__(self, client: WorkerLink, offloaded: list[Offloaded], model: nn.Module) -> None:
        """Move the one adapter of a PEFT model.

        Raises:
            ProtectionError: the model has none, or more than the worker can hold.
            WireError: the worker cannot be reached, or has no room.
        """
        self.client = client
        found = find_adapted(model)
        by_crossing = {layer.crossing: layer for layer in offloaded}
        self._adapters = [
            RemoteAdapter(client, by_crossing[crossing], layers, crossing.widths) for crossing, layers in found.items()
        ]
        self._optimizers: list[RemoteOptimizer] = []
        for adapter in self._adapters:
            adapter.attach()
        for adapter in self._adapters:
            self._install(adapter)
        self._layers = list(walk(found))
        extend(model, _TrainsOnWorker)
        self.here = [parameter for parameter in model.parameters() if parameter.requires_grad]
        """What else is trained: adapters of layers that stay in the enclave, biases and the like."""

    def parameters(self) -> list[nn.Parameter]:
        """PEFT's parameters that the factors are fetched into: A and B of every layer."""
        return [parameter for it in self._layers for parameter in (it.lora_a, it.lora_b)]

    def optimizer(self, method: str = "adamw", **settings: Any) -> RemoteOptimizer:
        """An optimizer on the worker; see `RemoteOptimizer`."""
        optimizer = RemoteOptimizer(self, method, **settings)
        self._optimizers.append(optimizer)
        return optimizer

    def fetch(self) -> None:
        """Bring the factors into PEFT's parameters."""
        for adapter in self._adapters:
            adapter.fetch_factors()

    def put(self) -> None:
        """Put PEFT's parameters on the worker."""
        for adapter in self._adapters:
            adapter.put_factors()

    def fetch_moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """AdamW's moments by parameter."""
        return {
            parameter: moments for adapter in self._adapters for parameter, moments in adapter.fetch_moments().items()
        }

    def put_moments(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Put AdamW's moments on the worker."""
        for adapter in self._adapters:
            adapter.put_moments(state)

    def of(self, offloaded: Offloaded) -> RemoteAdapter | None:
        """The adapter of one matrix; None where it has none."""
        return next((adapter for adapter in self._adapters if adapter.offloaded is offloaded), None)

    def _install(self, adapter: RemoteAdapter) -> None:
        crossing = AdaptedCrossing(adapter.offloaded.crossing, adapter)
        for member in adapter.offloaded.crossing._members:
            member._crossing = crossing  # type: ignore[assignment]
        for it in adapter.layers:
            _bypass(it, adapter)


class _TrainsOnWorker(_Module):
    """A model whose gradients are on the worker too: `Trainer` zeroes them by the model's method."""

    protection: Any

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        zero_all(self.protection.client)


class _LeftToWorker(_Module):
    """A LoRA layer of PEFT's whose adapter's part the worker computes, with its base layer's product."""

    base_layer: nn.Module

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self.base_layer(x)


def _bypass(it: AdaptedLayer, adapter: RemoteAdapter) -> None:
    """Have PEFT's layer leave its adapter's part to the base layer, and fetch and put the factors with its state."""
    extend(it.layer, _LeftToWorker)
    it.lora_a.requires_grad_(False)
    it.lora_b.requires_grad_(False)
    it.layer.register_state_dict_pre_hook(lambda *_: adapter.fetch_layer(it))
    it.layer.register_load_state_dict_post_hook(lambda *_: adapter.put_layer(it))
