"""The learning rate as a function of the step, the same as Hugging Face's schedules of these names."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(peak: float, schedule: Schedule, warmup_steps: int, total_steps: int, step: int) -> float:
    """The rate that step `step` (from 0) is taken with.

    It rises linearly from 0 over `warmup_steps`, then stays (`constant`), or falls to 0 at `total_steps`
    linearly or along half a cosine: `transformers.get_scheduler`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
