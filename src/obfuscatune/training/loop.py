"""The training loop: AdamW on the LoRA factors, the loss weighted by tokens, one event a step.

Which examples go into which step is a function of the seed and the step alone. The factors after a step depend on the
factors and moments before it, the examples, the seed and the step's number, and on nothing else: dropout is seeded anew
for every forward pass. So a run that is resumed needs no saved generator, and a protected and a plain run of one seed
drop the same units.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from obfuscatune.errors import NonFiniteError
from obfuscatune.training.adapter import after_step, clip_gradients
from obfuscatune.training.data import IGNORED, Example
from obfuscatune.training.recipe import Interval, Recipe

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass, padded on the right.

    `input_ids`, `attention_mask` and `labels` are int64 of shape (batch, longest example).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    trained_tokens: int
    """Tokens that the loss counts."""


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad examples to the longest among them."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        mask[row, :size] = 1
        labels[row, :size] = torch.tensor(example.labels)
    trained = sum(example.trained_tokens for example in examples)
    return Batch(ids.to(device), mask.to(device), labels.to(device), trained)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `range(count)`: each index sorted by a hash of (seed, epoch, index).

    It depends on no random generator, hence on no library's version and no draw made elsewhere.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest())


@dataclass(frozen=True)
class Plan:
    """The order of a whole run. Steps count from 0.

    A step is one update of the factors, from up to `batch_size * accumulation` examples; the last of an epoch
    may have fewer.
    """

    examples: int
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the examples."""
        return -(-self.examples // (self.batch_size * self.accumulation))

    def epoch(self, step: int) -> int:
        """The pass that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of the examples of a step, one list for each forward pass."""
        order = epoch_order(self.examples, self.seed, self.epoch(step))
        size = self.batch_size * self.accumulation
        start = step % self.steps_per_epoch * size
        chosen = order[start : start + size]
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]


Schedule = Literal["linear", "cosine", "constant"]
"""Schedules of the learning rate, by Hugging Face's names."""


@dataclass(frozen=True)
class StepEvent:
    """What one step did. Losses are in nats per token."""

    step: int
    """Steps taken so far, this one included."""
    epoch: int
    """The pass over the examples, from 1."""
    loss: float
    """Mean over the step's trained tokens, before the update."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Trained tokens."""
    seconds: float


@dataclass(frozen=True)
class OptimizerSettings:
    """How a step follows from a gradient."""

    lr: float
    schedule: Schedule
    warmup_steps: int
    clip: float
    total_steps: int

    def lr_at(self, step: int) -> float:
        """The rate that step `step` (from 0) is taken with.

        It rises linearly from 0 over `warmup_steps`, then stays (`constant`), or falls to 0 at `total_steps`
        linearly or along half a cosine: `transformers.get_scheduler`.
        """
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.lr * max(0.0, 1.0 - progress)
        return self.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(peft_model: "PeftModel", *, weight_decay: float, lr: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with PyTorch's betas (0.9, 0.999) on all trainable parameters. `train` sets `lr` at each step.

    If the model's profile trains LoRA on the worker, this moves the adapter there, and the optimizer steps there.
    """
    protection = getattr(peft_model, "protection", None)
    if protection is not None and protection.lora_on_worker:
        remote: torch.optim.Optimizer = protection.move_adapter(peft_model).optimizer(
            "adamw", lr=lr, weight_decay=weight_decay
        )
        return remote
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)


def train(
    peft_model: "PeftModel",
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    plan: Plan,
    optimizer_settings: OptimizerSettings,
    *,
    pad_id: int,
    first_step: int = 0,
) -> Iterator[StepEvent]:
    """Take the steps from `first_step` (from 0) to the last, yielding after each.

    Between events the model and the optimizer are those after the step, and may be saved.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the factors are still those before the step.
    """
    for step in range(first_step, optimizer_settings.total_steps):
        began = time.perf_counter()
        chosen = [[examples[index] for index in indices] for indices in plan.micro_batches(step)]
        batches = [collate(micro, pad_id, peft_model.device) for micro in chosen]
        rate = optimizer_settings.lr_at(step)
        peft_model.train()
        loss = _accumulate(peft_model, batches, f"{plan.seed}/{step}")
        norm = clip_gradients(optimizer, optimizer_settings.clip)
        _refuse_non_finite(step, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(peft_model)
        yield StepEvent(
            step=step + 1,
            epoch=plan.epoch(step) + 1,
            loss=loss,
            lr=rate,
            grad_norm=norm,
            tokens=sum(batch.trained_tokens for batch in batches),
            seconds=time.perf_counter() - began,
        )


def mean_loss(
    peft_model: "PeftModel",
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Loss in nats per trained token over all examples, without dropout.

    Args:
        before_batch: Called before each forward pass; what it raises ends the measurement.
    """
    peft_model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            before_batch()
            batch = collate(examples[start : start + batch_size], pad_id, peft_model.device)
            total += _forward_loss(peft_model, batch).item() * batch.trained_tokens
            tokens += batch.trained_tokens
    return total / tokens


def _accumulate(peft_model: "PeftModel", batches: Sequence[Batch], label: str) -> float:
    """Backpropagate the mean over all trained tokens of the step, as Trainer's `num_items_in_batch` does."""
    tokens = sum(batch.trained_tokens for batch in batches)
    loss = 0.0
    device = peft_model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for index, batch in enumerate(batches):
            torch.manual_seed(_seed(f"{label}/{index}"))
            share = _forward_loss(peft_model, batch) * (batch.trained_tokens / tokens)
            share.backward()
            loss += share.item()
    return loss


def _forward_loss(peft_model: "PeftModel", batch: Batch) -> torch.Tensor:
    output = peft_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
    )
    loss: torch.Tensor = output.loss
    return loss


def _refuse_non_finite(step: int, loss: float, norm: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {name} is {value} at step {step + 1}; nothing of this step was kept: lower lr or clip, "
                "or look for a damaged model file"
            )


def _seed(label: str) -> int:
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Cadence:
    """A recipe over so many examples. Steps are counted once taken: 0 is before the first."""

    plan: Plan
    optimizer_settings: OptimizerSettings
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
        optimizer_settings = OptimizerSettings(recipe.lr, recipe.schedule, warmup, recipe.clip, total)
        return cls(plan, optimizer_settings, recipe.eval_every, recipe.checkpoint_every)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it is stopped early."""
        return self.optimizer_settings.total_steps

    def measures_at(self, step: int) -> bool:
        """Whether the loss on the eval records is measured after a step; at the run's two ends it always is."""
        return step in (0, self.total_steps) or self._is_due(self.eval_every, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return step == self.total_steps or self._is_due(self.checkpoint_every, step)

    def planned_before(self, ingredients: Mapping[str, Any] | None) -> int | None:
        """The steps that an earlier run planned, by its `ingredients`; None unless they are fewer than now."""
        if ingredients is None:
            return None
        steps = ingredients["max_steps"] or ingredients["epochs"] * self.plan.steps_per_epoch
        return steps if steps < self.total_steps else None

    def _is_due(self, every: Interval | None, step: int) -> bool:
        if every is None:
            return False
        return step % (self.plan.steps_per_epoch if every == "epoch" else every) == 0
