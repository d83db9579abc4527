"""An optimizer whose factors, gradients and moments are on the worker: every step is a message.

What is trained in the enclave besides (adapters of layers outside the blocks, say) takes the same step here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from obfuscatune.enclave.client.adapters import gradient_norm, step_all, zero_all
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.payloads import Method, Step

if TYPE_CHECKING:
    from obfuscatune.enclave.remote_lora.adapters import RemoteAdapters

METHODS = {"sgd": Method.SGD, "adamw": Method.ADAMW}


class RemoteOptimizer(torch.optim.Optimizer):
    """`torch.optim.SGD` without momentum, or `torch.optim.AdamW`, in the worker's basis.

    SGD takes the same path in every rotated basis. Adam does not: it divides each coordinate by its own size.
    """

    def __init__(
        self,
        adapters: RemoteAdapters,
        method: str = "adamw",
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ) -> None:
        """An optimizer of all adapters of a model.

        Args:
            adapters: what `Protection.move_adapter` returned.
            method: `adamw` or `sgd`.
            lr, betas, eps, weight_decay: as PyTorch's; they are sent with each step, and may change between steps.
            clip: largest gradient norm, applied at each step; None leaves that to `clip_grad_norm`.

        Raises:
            ConfigError: no such method.
        """
        if method not in METHODS:
            raise ConfigError(f"method {method!r}: the worker knows {', '.join(METHODS)}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([*adapters.parameters(), *adapters.here], defaults)
        self._adapters, self._method, self._clip = adapters, METHODS[method], clip
        self._local = self._make_local(adapters.here, defaults)
        self._gradient_scale = 1.0
        self.steps = 0

    def clip_grad_norm(self, largest: float) -> float:
        """Have the next step take gradients no larger than that, all together; returns their norm, unclipped."""
        norm = gradient_norm(self._adapters.client)
        if self._local is not None:
            gradients = [it.grad for it in self._adapters.here if it.grad is not None]
            norm = math.hypot(norm, float(torch.nn.utils.get_total_norm(gradients)))
        # as torch.nn.utils.clip_grad_norm_ has it, its 1e-6 included
        self._gradient_scale = min(1.0, largest / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        return norm

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all factors. A closure is not called."""
        if closure is not None:
            raise ConfigError("an optimizer on the worker takes no closure")
        if self._clip is not None:
            self.clip_grad_norm(self._clip)
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        step = Step(
            self._method,
            self.steps + 1,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            self._gradient_scale,
        )
        if self._local is not None:
            self._step_local(group)
        step_all(self._adapters.client, step)
        self.steps += 1
        self._gradient_scale = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients to zero."""
        zero_all(self._adapters.client)
        if self._local is not None:
            self._local.zero_grad(set_to_none)
        self._gradient_scale = 1.0

    def fetch_state(self) -> None:
        """Bring AdamW's moments into `state`, for a checkpoint: the first exactly, the second by an estimate."""
        self.state.clear()
        if self._local is not None:
            self.state.update(self._local.state)
        if self._method is Method.ADAMW and self.steps:
            for parameter, moments in self._adapters.fetch_moments().items():
                self.state[parameter] = {"step": torch.tensor(float(self.steps)), **moments}

    def store_state(self) -> None:
        """Put the moments in `state` on the worker, and go on counting steps from there."""
        state: dict[Any, dict[str, Any]] = dict(self.state)
        self.steps = int(max((float(it["step"]) for it in state.values()), default=0.0))
        self._adapters.put_moments(state)
        if self._local is not None:
            self._local.state.update({it: state[it] for it in self._adapters.here if it in state})

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's, with the moments as `fetch_state` brings them."""
        self.fetch_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, and on to the worker."""
        super().load_state_dict(state_dict)
        self.store_state()

    def _make_local(
        self, parameters: list[torch.nn.Parameter], settings: dict[str, Any]
    ) -> torch.optim.Optimizer | None:
        if not parameters:
            return None
        if self._method is Method.ADAMW:
            return torch.optim.AdamW(parameters, **settings)
        return torch.optim.SGD(parameters, lr=settings["lr"], weight_decay=settings["weight_decay"])

    def _step_local(self, settings: dict[str, Any]) -> None:
        """Step the trained parameters that are in this process."""
        if self._local is None:
            return
        (group,) = self._local.param_groups
        group.update({name: settings[name] for name in group if name in ("lr", "betas", "eps", "weight_decay")})
        for parameter in self._adapters.here:
            if parameter.grad is not None and self._gradient_scale != 1.0:
                parameter.grad.mul_(self._gradient_scale)
        self._local.step()
