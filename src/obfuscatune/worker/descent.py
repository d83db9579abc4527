"""One step of a factor against its gradient, as PyTorch's optimizers take it."""

import math

from obfuscatune.wire.adapters import Method, Step
from obfuscatune.worker.lora import Moved


def descend(factor: Moved, step: Step) -> None:
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
