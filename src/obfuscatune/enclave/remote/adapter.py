"""One matrix's adapter on the worker, and PEFT's parameters that it is put from and fetched back into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obfuscatune.enclave.link import AdapterLink, WorkerLink
from obfuscatune.enclave.offloaded import Offloaded
from obfuscatune.enclave.remote.basis import Basis
from obfuscatune.enclave.remote.find import AdaptedLayer
from obfuscatune.wire.adapters import Attachment, Part, Slice
from obfuscatune.wire.errors import ProtectionError

MOMENTS = {
    "exp_avg": (Part.A_FIRST, Part.B_FIRST),
    "exp_avg_sq": (Part.A_SECOND, Part.B_SECOND),
}
"""PyTorch's names of AdamW's state for a parameter."""


class RemoteAdapter:
    """The adapters of the layers that share one matrix."""

    def __init__(
        self, link: WorkerLink, offloaded: Offloaded, layers: list[AdaptedLayer], widths: tuple[int, ...]
    ) -> None:
        """Nothing is sent before `attach`."""
        if len(widths) > 1 and offloaded.R_out.name != "identity":
            raise ProtectionError(
                f"{offloaded.name}: a transform mixes the outputs of several layers, so none of them can have an "
                "adapter of its own on the worker; use sides='paper'"
            )
        self._link, self.offloaded, self.layers, self.widths = link, offloaded, layers, widths
        self._remote: AdapterLink | None = None

    @property
    def remote(self) -> AdapterLink:
        """What it is on the worker."""
        if self._remote is None:
            raise ProtectionError("this adapter was not moved to the worker yet")
        return self._remote

    def attach(self) -> None:
        """Have the worker make room for it beside the matrix as it is now, and put the factors there."""
        slices = []
        for it in self.layers:
            first = sum(self.widths[: it.slot])
            slices.append(Slice(first, self.widths[it.slot], it.rank, it.scale, it.dropout))
        shape = self.offloaded.R_in.dim, sum(self.widths)
        attachment = Attachment(self.offloaded.matrix_id, tuple(slices))
        self._remote = AdapterLink(self._link, attachment, shape, self.layers[0].lora_a.dtype)
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
        """The worker's moments, likewise."""
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
        return Basis(self.offloaded.R_in, self.offloaded.R_out, self.widths[self.layers[index].slot])
