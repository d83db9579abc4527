"""One matrix's adapter on the worker, and PEFT's parameters that it is put from and fetched back into.

Factors and their moments go into the worker's basis and back in float64, rounded once to their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from obfuscatune.enclave.client import AdapterClient, WorkerLink
from obfuscatune.enclave.layers import ProtectedConv1D, ProtectedLinear, SharedCrossing
from obfuscatune.enclave.spill_store import Offloaded
from obfuscatune.enclave.transforms import Transform
from obfuscatune.errors import ProtectionError
from obfuscatune.protocol.payloads import Attachment, Part, Slice

MOMENTS = {
    "exp_avg": (Part.A_FIRST, Part.B_FIRST),
    "exp_avg_sq": (Part.A_SECOND, Part.B_SECOND),
}
"""PyTorch's names of AdamW's state for a parameter."""


class RemoteAdapter:
    """The adapters of the layers that share one matrix."""

    def __init__(
        self, client: WorkerLink, offloaded: Offloaded, layers: list[AdaptedLayer], widths: tuple[int, ...]
    ) -> None:
        """Nothing is sent before `attach`."""
        if len(widths) > 1 and offloaded.R_out.name != "identity":
            raise ProtectionError(
                f"{offloaded.name}: a transform mixes the outputs of several layers, so none of them can have an "
                "adapter of its own on the worker; use sides='paper'"
            )
        self._client, self.offloaded, self.layers, self.widths = client, offloaded, layers, widths
        self._remote: AdapterClient | None = None

    @property
    def remote(self) -> AdapterClient:
        """What it is on the worker."""
        if self._remote is None:
            raise ProtectionError("this adapter was not moved to the worker yet")
        return self._remote

    def attach(self) -> None:
        """Have the worker make room for it beside the matrix as it is now, and put the factors there."""
        slices = []
        for it in self.layers:
            first = sum(self.widths[: it.member])
            slices.append(Slice(first, self.widths[it.member], it.rank, it.scale, it.dropout))
        shape = self.offloaded.R_in.dim, sum(self.widths)
        attachment = Attachment(self.offloaded.matrix_id, tuple(slices))
        self._remote = AdapterClient(self._client, attachment, shape, self.layers[0].lora_a.dtype)
        self.put_factors()

    def put_factors(self) -> None:
        """PEFT's parameters to the worker."""
        for it in self.layers:
            self.put_layer(it)

    def fetch_factors(self) -> None:
        """The worker's factors into PEFT's parameters."""
        for it in self.layers:
            self.fetch_layer(it)

    def put_layer(self, it: AdaptedLayer) -> None:
        """One layer's parameters to the worker."""
        index = self.layers.index(it)
        self._put(index, Part.A, it.lora_a)
        self._put(index, Part.B, it.lora_b)

    def fetch_layer(self, it: AdaptedLayer) -> None:
        """One layer's factors from the worker."""
        index = self.layers.index(it)
        with torch.no_grad():
            it.lora_a.copy_(self._fetch(index, Part.A))
            it.lora_b.copy_(self._fetch(index, Part.B))

    def put_moments(self, state: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """AdamW's moments of PEFT's parameters, as `torch.optim.AdamW.state` has them, to the worker."""
        for index, it in enumerate(self.layers):
            for name, (of_A, of_B) in MOMENTS.items():
                if it.lora_a in state and it.lora_b in state:
                    self._put(index, of_A, state[it.lora_a][name])
                    self._put(index, of_B, state[it.lora_b][name])

    def fetch_moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The worker's moments, in the form of `torch.optim.AdamW.state`."""
        state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for index, it in enumerate(self.layers):
            for name, (of_A, of_B) in MOMENTS.items():
                state.setdefault(it.lora_a, {})[name] = self._fetch(index, of_A)
                state.setdefault(it.lora_b, {})[name] = self._fetch(index, of_B)
        return state

    def take_down(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Bring factors and moments here, before the matrix is re-keyed; the moments, for `put_up`."""
        self.fetch_factors()
        return self.fetch_moments()

    def put_up(self, moments: dict[nn.Parameter, dict[str, Tensor]]) -> None:
        """Attach it to the matrix as it is now, and put factors and moments there; the worker drops what it had."""
        outdated = self.remote
        self.attach()
        self.put_moments(moments)
        outdated.forget()

    def _put(self, index: int, part: Part, value: Tensor) -> None:
        """`value` as PEFT has it, the transpose of the formulas' A and B."""
        self.remote.put(index, part, self._basis(index).outward(part, value.detach().T))

    def _fetch(self, index: int, part: Part) -> Tensor:
        return self._basis(index).inward(part, self.remote.fetch(index, part)).T.contiguous()

    def _basis(self, index: int) -> Basis:
        return Basis(self.offloaded.R_in, self.offloaded.R_out, self.widths[self.layers[index].member])


@dataclass(frozen=True)
class AdaptedLayer:
    """A protected layer that PEFT wrapped, and its one adapter: y = x W + s · drop(x) A B."""

    layer: Any
    """PEFT's `lora.Linear`."""
    name: str
    """The adapter's name in PEFT."""
    member: int
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
    """The adapted layers of each crossing, by member.

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
    return {crossing: sorted(layers, key=lambda it: it.member) for crossing, layers in found.items()}


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
    return AdaptedLayer(module, name, base._member)


def walk(found: dict[SharedCrossing, list[AdaptedLayer]]) -> Iterator[AdaptedLayer]:
    """All of them."""
    for layers in found.values():
        yield from layers


class Basis:
    """The transforms of one matrix, applied to its factors: R_in to A (p, r), R_out to B (r, width)."""

    def __init__(self, R_in: Transform, R_out: Transform, width: int) -> None:
        """`width`: columns that the factors have; R_out is 1 where that is not all of them."""
        self._R_in = R_in
        self._R_out = R_out if R_out.dim == width else None

    def outward(self, part: Part, value: Tensor) -> Tensor:
        """As the worker is to hold it."""
        return self._through(part, value, out=True)

    def inward(self, part: Part, value: Tensor) -> Tensor:
        """As it is here."""
        return self._through(part, value, out=False)

    def _through(self, part: Part, value: Tensor, *, out: bool) -> Tensor:
        x = value.detach().cpu().double()
        match part:
            case Part.A:
                x = self._R_in.weight_left(x) if out else self._R_in.apply_transpose(x.T).T
            case Part.A_FIRST:
                x = (self._R_in.apply if out else self._R_in.inverse)(x.T).T
            case Part.A_SECOND:
                x = (x.T @ _squares(self._R_in, inverse=not out)).T
            case _ if self._R_out is None:
                pass
            case Part.B:
                x = (self._R_out.apply if out else self._R_out.inverse)(x)
            case Part.B_FIRST:
                x = (self._R_out.inverse_transpose if out else self._R_out.apply_transpose)(x)
            case Part.B_SECOND:
                x = x @ _squares(self._R_out, inverse=out).T
        return x.to(value.dtype).contiguous()


def _squares(R: Transform, *, inverse: bool) -> Tensor:
    """R ∘ R, or R⁻¹ ∘ R⁻¹: (dim, dim), float64."""
    one = torch.eye(R.dim, dtype=torch.float64)
    return (R.inverse(one) if inverse else R.apply(one)).square()
