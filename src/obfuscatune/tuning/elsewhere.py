"""What the loop and the checkpoints need to know of a protected model: its adapter may be elsewhere.

Whoever protects a model may move its adapter away (`protection.lora_on_worker`). It then gives an optimizer that steps
there; gradients are clipped and moments fetched there too. Nothing else in this package asks where anything is.
"""

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class TrainsElsewhere(Protocol):
    """An optimizer whose gradients and moments are not in this process."""

    def clip_grad_norm(self, largest: float) -> float:
        """Have the next step take no larger a gradient; returns the norm as it is."""

    def fetch_state(self) -> None:
        """Bring the moments into `state`."""

    def store_state(self) -> None:
        """Send the moments in `state` back."""


def moved_optimizer(model: torch.nn.Module, **settings: Any) -> torch.optim.Optimizer | None:
    """Move the adapter away, where the model's protection has it elsewhere; None where it is trained here."""
    protection = getattr(model, "protection", None)
    if protection is None or not protection.lora_on_worker:
        return None
    optimizer: torch.optim.Optimizer = protection.move_adapter(model).optimizer("adamw", **settings)
    return optimizer


def after_step(model: torch.nn.Module) -> None:
    """Let a protected model renew its secrets, if its profile says so."""
    protection = getattr(model, "protection", None)
    if protection is not None:
        protection.after_step()


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> float:
    """Scale all gradients together so that their norm is no larger; returns the norm before."""
    if isinstance(optimizer, TrainsElsewhere):
        return optimizer.clip_grad_norm(largest)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, largest).item()
