"""LoRA's arithmetic beside a product: forward, backward, and a step of the factors.

    forward    h = drop(x) A       y = x W + s · h B
    backward   dB += s · hᵀ g      dh = s · g Bᵀ      dA += drop(x)ᵀ dh      dx = g Wᵀ + drop'(dh Aᵀ)

All of it is in the basis that the worker sees. Dropout is the worker's own: nobody else knows its draws. Sums are
made in the factors' dtype and rounded to the matrix's once. Steps are those of PyTorch's optimizers.
"""

import math
from dataclasses import dataclass

import torch

from obfuscatune.protocol.payloads import Method, Part, Slice, Step


@dataclass(frozen=True)
class Moved:
    """One factor, its gradient, and AdamW's two moments; all of one shape."""

    value: torch.Tensor
    gradient: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def zeros(cls, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> "Moved":
        """All zero, (rows, cols)."""
        return cls(*(torch.zeros(rows, cols, dtype=dtype, device=device) for _ in range(4)))


@dataclass(frozen=True)
class Factors:
    """A (p, r) and B (r, width) of one slice."""

    settings: Slice
    A: Moved
    B: Moved

    @classmethod
    def zeros(cls, settings: Slice, p: int, dtype: torch.dtype, device: torch.device) -> "Factors":
        """All zero: the values are put later."""
        r = settings.rank
        return cls(settings, Moved.zeros(p, r, dtype, device), Moved.zeros(r, settings.width, dtype, device))

    @property
    def columns(self) -> slice:
        """Which of the matrix's columns they belong to."""
        return slice(self.settings.first, self.settings.first + self.settings.width)

    def moved(self) -> tuple[Moved, Moved]:
        """A and B."""
        return self.A, self.B

    def part(self, part: Part) -> torch.Tensor:
        """One of their matrices."""
        factor = self.A if part in (Part.A, Part.A_FIRST, Part.A_SECOND) else self.B
        if part in (Part.A, Part.B):
            return factor.value
        return factor.first if part in (Part.A_FIRST, Part.B_FIRST) else factor.second


@dataclass(frozen=True)
class Kept:
    """What a backward pass needs of its forward pass: x (m, p), and for each slice h (m, r) and what dropout let pass.

    `passed` (m, p) is bool, None where nothing was dropped.
    """

    x: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    passed: tuple[torch.Tensor | None, ...]


def kept_bytes(kept: Kept) -> int:
    """Memory that it takes."""
    tensors = (kept.x, *kept.hidden, *(it for it in kept.passed if it is not None))
    return sum(tensor.nbytes for tensor in tensors)


def add_forward(x: torch.Tensor, y: torch.Tensor, slices: tuple[Factors, ...], dropout: torch.Generator | None) -> Kept:
    """Add every slice's part to y = x W (m, q), in place.

    Args:
        x: (m, p), in the factors' dtype; kept, so it must not change.
        y: as computed; each part is added in the factors' dtype and rounded to that of `y`.
        slices: disjoint columns.
        dropout: draws what is dropped; None drops nothing.
    """
    hidden, passed = [], []
    for factors in slices:
        chance = factors.settings.dropout
        through = None
        if dropout is not None and chance > 0:
            through = torch.rand(x.shape, dtype=torch.float32, device=x.device, generator=dropout) >= chance
        h = _drop(x, through, chance) @ factors.A.value
        part = y[:, factors.columns]
        part.copy_(part.to(h.dtype).add(h @ factors.B.value, alpha=factors.settings.scale))
        hidden.append(h)
        passed.append(through)
    return Kept(x, tuple(hidden), tuple(passed))


def add_backward(g: torch.Tensor, dx: torch.Tensor, slices: tuple[Factors, ...], kept: Kept) -> None:
    """Add every slice's part to dx = g Wᵀ (m, p), in place, and its gradients to those that are there.

    Args:
        g: (m, q), in the factors' dtype.
        dx: as computed; each part is added in the factors' dtype and rounded to that of `dx`.
    """
    for factors, h, through in zip(slices, kept.hidden, kept.passed, strict=True):
        scale, chance = factors.settings.scale, factors.settings.dropout
        part = g[:, factors.columns]
        factors.B.gradient.addmm_(h.t(), part, alpha=scale)
        dh = (part @ factors.B.value.t()).mul_(scale)
        factors.A.gradient.addmm_(_drop(kept.x, through, chance).t(), dh)
        dx.copy_(dx.to(dh.dtype).add(_drop(dh @ factors.A.value.t(), through, chance)))


def _drop(x: torch.Tensor, through: torch.Tensor | None, chance: float) -> torch.Tensor:
    """What passes, made larger so that its mean stays."""
    return x if through is None else (x * through).div_(1.0 - chance)


def take_step(factor: Moved, step: Step) -> None:
    """Change a factor in place, as `torch.optim.SGD` without momentum or `torch.optim.AdamW` does."""
    gradient = factor.gradient if step.gradient_scale == 1.0 else factor.gradient * step.gradient_scale
    if step.method is Method.SGD:
        if step.weight_decay:
            gradient = gradient.add(factor.value, alpha=step.weight_decay)
        factor.value.add_(gradient, alpha=-step.lr)
        return
    factor.value.mul_(1.0 - step.lr * step.weight_decay)
    factor.first.lerp_(gradient, 1.0 - step.beta1)
    factor.second.mul_(step.beta2).addcmul_(gradient, gradient, value=1.0 - step.beta2)
    first_share = 1.0 - step.beta1**step.number
    second_share = 1.0 - step.beta2**step.number
    size = factor.second.sqrt().div_(math.sqrt(second_share)).add_(step.eps)
    factor.value.addcdiv_(factor.first, size, value=-step.lr / first_share)
