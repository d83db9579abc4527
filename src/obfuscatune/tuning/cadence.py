"""What a run does at which step: how many it takes, and after which of them it measures and saves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from obfuscatune.tuning.batches import Plan
from obfuscatune.tuning.loop import Descent
from obfuscatune.tuning.recipe import Interval, Recipe


@dataclass(frozen=True)
class Cadence:
    """A recipe over so many examples. Steps are counted once taken: 0 is before the first."""

    plan: Plan
    descent: Descent
    eval_every: Interval | None
    checkpoint_every: Interval

    @classmethod
    def of(cls, recipe: Recipe, examples: int) -> Self:
        """Settle what the recipe leaves to the number of examples."""
        plan = Plan(examples, recipe.batch_size, recipe.accumulation, recipe.seed)
        total = recipe.max_steps or recipe.epochs * plan.steps_per_epoch
        warmup = recipe.warmup_steps
        if recipe.warmup_ratio is not None:
            warmup = math.ceil(total * recipe.warmup_ratio)
        descent = Descent(recipe.lr, recipe.schedule, warmup, recipe.clip, total)
        return cls(plan, descent, recipe.eval_every, recipe.checkpoint_every)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it is stopped early."""
        return self.descent.total_steps

    def measures_at(self, step: int) -> bool:
        """Whether the loss on the eval records is measured after a step; at the run's two ends it always is."""
        return step in (0, self.total_steps) or self._is_due(self.eval_every, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return step == self.total_steps or self._is_due(self.checkpoint_every, step)

    def planned_before(self, ingredients: Mapping[str, Any] | None) -> int | None:
        """The steps that a checkpoint's run was to take (`identity.py`), where these are fewer."""
        if ingredients is None:
            return None
        steps = ingredients["max_steps"] or ingredients["epochs"] * self.plan.steps_per_epoch
        return steps if steps < self.total_steps else None

    def _is_due(self, every: Interval | None, step: int) -> bool:
        if every is None:
            return False
        return step % (self.plan.steps_per_epoch if every == "epoch" else every) == 0
